"""The demo does what it says, says when something is short, and leaves nothing behind."""

import asyncio
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.commands import KVCACHED
from helpers.waiting import PATIENCE_SECONDS, await_that

from kvcached_core.ledger.activations import Activations
from kvcached_core.ledger.view import DeviceView, InstanceView
from kvcached_core.units import MIB
from kvcached_demo import run
from kvcached_demo.harness import engines
from kvcached_demo.harness.load import Completion, _events
from kvcached_demo.harness.memory import Recording
from kvcached_demo.turns import NUM_TURNS, Turn, Turns
from kvcached_demo.verdict import judge, judge_turns

PNG = b"\x89PNG"


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with a short name: vLLM's sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="kvd-") as folder:
        yield Path(folder)


@pytest.fixture
def demo(tmp_path: Path, scratch: Path) -> Iterator["subprocess.Popen[str]"]:
    """A demo that runs; one that a test leaves behind is interrupted, and ends its servers."""
    with subprocess.Popen(
        [KVCACHED, "demo", "--output", str(tmp_path / "out")],
        env={**os.environ, "TMPDIR": str(scratch), "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        yield process
        process.send_signal(signal.SIGINT)


def processes_naming(text: str) -> Iterator[str]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in command:
            yield command


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.every_release
def test_the_demo_meets_its_bars_and_writes_its_report(
    demo: "subprocess.Popen[str]", tmp_path: Path, scratch: Path
) -> None:
    text, _ = demo.communicate()
    assert demo.returncode == 0, text
    assert "48 of 48" in text
    assert f"{2 * NUM_TURNS} of {2 * NUM_TURNS}" in text
    assert (tmp_path / "out" / "memory.png").read_bytes().startswith(PNG)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Everything met its bar." in page
    assert page.count("<tr>") > 8
    assert list(scratch.iterdir()) == []
    assert list(processes_naming(str(scratch))) == []


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.every_release  # under `make test` its signals, around other work, in test_watched.py
def test_a_demo_that_is_interrupted_twice_leaves_no_process_and_no_file(
    demo: "subprocess.Popen[str]", scratch: Path
) -> None:
    await_that(
        lambda: any(scratch.glob("kvcached-demo-*/kv/host.ledger")) or demo.poll() is not None
    )
    assert demo.poll() is None
    demo.send_signal(signal.SIGINT)
    demo.send_signal(signal.SIGINT)
    text, _ = demo.communicate(timeout=PATIENCE_SECONDS)
    assert demo.returncode == 128 + signal.SIGINT, text
    assert list(scratch.iterdir()) == []
    assert list(processes_naming(str(scratch))) == []


def instance(name: str, resident_bytes: int) -> InstanceView:
    numbers = dict.fromkeys(InstanceView.__dataclass_fields__, 0)
    numbers |= {"resident_bytes": resident_bytes, "page_bytes": 16 * MIB}
    return InstanceView(**{**numbers, "name": name, "engine": "e"})


def verdict(first: int, second: int, answers: list[Completion]) -> dict[str, bool]:
    views = [
        DeviceView("host", 512 * MIB, (instance(run.NAMES[0], first * MIB),)),
        DeviceView("host", 512 * MIB, (instance(run.NAMES[1], second * MIB),)),
        DeviceView("host", 512 * MIB, (instance(run.NAMES[0], 32 * MIB),)),
    ]
    recording = Recording([0.0, 1.0, 2.0], views)
    vanilla = {name: [Completion([1, 2], 0.1)] for name in run.NAMES}
    rows = judge(recording, {"burst": {run.NAMES[0]: answers}}, vanilla, 512 * MIB)
    return {what: is_met for what, _, _, is_met in rows}


def test_the_verdict_names_what_is_short() -> None:
    good = verdict(400, 400, [Completion([1, 2], 0.1)])
    assert all(good.values())
    assert not verdict(300, 300, [Completion([1, 2], 0.1)])["sum of both peaks"]
    assert not verdict(400, 400, [Completion([1, 3], 0.1)])["tokens identical to vanilla"]
    failed = verdict(400, 400, [Completion([1], 0.1, "ReadError: gone")])
    assert not failed["requests completed"]


ANSWER = Completion([1, 2], 0.5)


def verdict_on_turns(*, answer: Completion = ANSWER, **settings: Any) -> dict[str, bool]:
    awake = Completion([1, 2], 0.1)
    turns = [Turn(name, name != run.NAMES[0], 12 * MIB, answer, awake) for name in run.NAMES * 2]
    settings = {"num_activations": 1, "needed": 24 * MIB, **settings}
    woken = Activations((settings["num_activations"], 0, 0, 0), 20_000)
    found = Turns(turns, dict.fromkeys(run.NAMES, woken), settings["needed"], 22 * MIB)
    vanilla = {name: [Completion([1, 2], 0.1)] for name in run.NAMES}
    rows = judge_turns(found, vanilla)
    said = {what: measured for what, measured, _, _ in rows}
    assert said["weights given"] == "48 MiB"
    return {what: is_met for what, _, _, is_met in rows}


def test_the_verdict_on_turns_names_what_is_short() -> None:
    assert all(verdict_on_turns().values())
    assert not verdict_on_turns(needed=22 * MIB)["weights of both"]
    assert not verdict_on_turns(num_activations=0)["weights came back"]
    wrong = verdict_on_turns(answer=Completion([1, 3], 0.1))
    assert not wrong["tokens identical to vanilla, in turn"]
    failed = verdict_on_turns(answer=Completion([1], 0.1, "ReadError: gone"))
    assert not failed["requests completed, in turn"]


def test_line_breaks_in_the_text_do_not_end_an_event() -> None:
    text = "a\u2028b\x85c\x0bd"
    events = [json.dumps({"text": text}, ensure_ascii=False), json.dumps({"n": 2})]
    stream = "".join(f"data: {event}\n\n" for event in events).encode() + b"data: [DONE]\n\n"

    async def read() -> list[Any]:
        async def in_small_pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(stream), 3):
                yield stream[start : start + 3]

        response = httpx.Response(200, content=in_small_pieces())
        return [json.loads(data) async for data in _events(response)]

    assert asyncio.run(read()) == [{"text": text}, {"n": 2}]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "EXTRA_MODULES", ("no_such_module",))
    with pytest.raises(run.DemoError, match=r"needs no_such_module; pip install.*demo"):
        run.run_demo(Path("unused"), 512 * MIB, workspace=Path("unused"))


def test_a_missing_engine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise engines.PackageNotFoundError(name)

    monkeypatch.setattr(engines, "version", nothing)
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    with pytest.raises(run.DemoError, match=r"no vLLM is installed.*make demo"):
        run.run_demo(Path("unused"), 512 * MIB, workspace=Path("unused"))


def test_a_pool_too_small_for_the_bursts_is_refused_by_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [KVCACHED, "demo", "--pool", "64MiB"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "--pool=64 MiB is too small" in done.stderr


@pytest.mark.parametrize("engines", ["vllm", "vllm,vllm,vllm", "vllm,tgi", ""])
def test_other_engines_are_refused_by_the_command(engines: str) -> None:
    done = subprocess.run(
        [KVCACHED, "demo", "--engines", engines], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"--engines={engines!r} is not allowed; name two of sglang, vllm" in done.stderr
