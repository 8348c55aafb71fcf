"""The command line: what it prints, and how it ends."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.commands import KVCACHED
from helpers.waiting import PATIENCE_SECONDS
from prometheus_client.parser import text_string_to_metric_families

from kvcached_core.ledger.bell import Doorbell
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import doorbell_path, ledger_directory
from kvcached_core.ledger.policy import Policy
from kvcached_core.units import GIB, KIB, MIB

PAGE = 16 * MIB


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(ledger_directory(tmp_path / "kv") / "host.ledger", GIB) as opened:
        row = opened.register(name="llama", engine="vllm 0.32.0", policy=Policy(GIB // 2))
        opened.describe(row, page_bytes=PAGE, virtual_bytes=GIB, token_bytes=128 * KIB)
        opened.promise(row, 8 * PAGE, PAGE)
        opened.settle(row, mapped_bytes=8 * PAGE, used_bytes=2 * PAGE, cached_bytes=5 * PAGE)
        yield opened


def kvcached(*arguments: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [KVCACHED, *arguments],
        env={**os.environ, "KVCACHED_DIR": str(directory), "COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_top_as_json_holds_every_size_in_bytes(ledger: Ledger) -> None:
    done = kvcached("top", "--once", "--json", directory=ledger.path.parent)
    (device,) = json.loads(done.stdout)["devices"]
    (instance,) = device["instances"]
    assert (device["device"], device["capacity_bytes"]) == ("host", GIB)
    assert device["free_bytes"] == GIB - 8 * PAGE
    assert instance["resident_bytes"] == 8 * PAGE
    assert instance["resident_bytes"] == sum(
        instance[f"{state}_bytes"] for state in ("used", "cached", "idle")
    )
    assert instance["limit_bytes"] == GIB // 2


def test_what_a_token_takes_is_listed_and_in_the_metrics(ledger: Ledger) -> None:
    directory = ledger.path.parent
    listed = json.loads(kvcached("list", "--json", directory=directory).stdout)
    assert listed["devices"][0]["instances"][0]["token_bytes"] == 128 * KIB
    text = kvcached("metrics", "--once", directory=directory).stdout
    assert 'kvcached_token_bytes{device="host",engine="vllm 0.32.0"' in text
    assert f"}} {float(128 * KIB)}\n" in text


def test_top_prints_a_plain_table_where_there_is_no_terminal(ledger: Ledger) -> None:
    done = kvcached("top", directory=ledger.path.parent)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    for part in ("llama", "896 MiB free of 1 GiB", "128 MiB", "32 MiB", "80 MiB", "512 MiB"):
        assert part in done.stdout


def test_list_prints_a_line_for_each_instance(ledger: Ledger) -> None:
    listed = kvcached("list", directory=ledger.path.parent)
    assert listed.stdout.startswith("host\tllama\tvllm 0.32.0\tpid")
    assert listed.stdout.endswith("\tweights -\n")
    assert (listed.stdout.count("\n"), listed.stderr) == (1, "")


def test_weights_are_listed_shown_counted_and_steered(ledger: Ledger) -> None:
    directory, row = ledger.path.parent, ledger.view().instances[0].row
    for command in ("sleep", "wake"):
        refused = kvcached(command, "llama", directory=directory)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "llama: refused: the weights of 'llama' never yield" in refused.stderr
    ledger.describe_weights(row, 30 * PAGE)
    ledger.settle_weights(row, mapped_bytes=12 * PAGE)
    ledger.offer_weights(row, 12 * PAGE)
    ledger.activated(row, 300_000_000)
    assert "\tweights 192/480M" in kvcached("list", directory=directory).stdout
    assert "192/480M" in kvcached("top", directory=directory).stdout
    woken = kvcached("wake", "llama", "--timeout", "0", directory=directory)
    assert (woken.returncode, woken.stdout) == (
        *(3, "llama: in progress, 320 MiB -> 320 MiB, 288 MiB to come\n"),
    )
    shown = json.loads(kvcached("top", "--json", directory=directory).stdout)
    (instance,) = shown["devices"][0]["instances"]
    assert instance["resident_bytes"] == sum(
        instance[f"{state}_bytes"] for state in ("used", "cached", "idle", "weights")
    )
    text = kvcached("metrics", "--once", directory=directory).stdout
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }
    assert (found["kvcached_weights_bytes"], found["kvcached_weights_offered_bytes"]) == (
        *(12 * PAGE, 12 * PAGE),
    )
    assert found["kvcached_weights_needed_bytes"] == 30 * PAGE
    assert (found["kvcached_activations_total"], found["kvcached_activation_seconds_sum"]) == (
        *(1, 0.3),
    )
    assert 'kvcached_activation_seconds_bucket{device="host",engine="vllm 0.32.0"' in text


def test_where_nobody_runs_that_is_said_and_not_taken_for_an_instance(tmp_path: Path) -> None:
    said = {"list": "no instance runs\n", "trim": "no instance runs: nothing to trim\n"}
    for command, text in said.items():
        empty = kvcached(command, directory=tmp_path)
        assert (empty.returncode, empty.stdout, empty.stderr) == (0, "", text)
    assert "no instance runs" in kvcached("top", directory=tmp_path).stdout


def test_a_shell_completes_commands_and_the_names_of_instances(ledger: Ledger) -> None:
    script = """
        eval "$(kvcached --show-completion bash)"
        for words in "kvcached do" "kvcached limit l" "kvcached trim q"; do
            COMP_WORDS=($words) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
            _kvcached_completion kvcached; echo "${COMPREPLY[@]}"
        done
    """
    done = subprocess.run(
        ["bash", "-c", script],
        env={
            **os.environ,
            "PATH": f"{KVCACHED.parent}:{os.environ['PATH']}",
            "KVCACHED_DIR": str(ledger.path.parent),
            "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",  # then the option names the shell
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["doctor", "llama", ""]


def test_trim_asks_and_waits_for_the_answer(ledger: Ledger) -> None:
    row = ledger.view().instances[0].row

    def give() -> None:
        given = ledger.wanted(row).asked_bytes
        ledger.settle(row, unmapped_bytes=given, used_bytes=2 * PAGE, cached_bytes=PAGE)
        ledger.acknowledge(row)

    bell = Doorbell(doorbell_path(ledger.path, row), give)
    done = kvcached("trim", "llama", "--keep", "32MiB", directory=ledger.path.parent)
    bell.close()
    assert (done.returncode, done.stdout) == (0, "llama: applied, 128 MiB -> 64 MiB\n")


def test_trim_says_when_the_time_was_up(ledger: Ledger) -> None:
    done = kvcached("trim", "--timeout", "0.1", directory=ledger.path.parent)
    assert done.returncode == 3
    assert "llama: in progress, 128 MiB -> 128 MiB, " in done.stdout


def test_limit_floor_and_priority_say_what_became_of_them(ledger: Ledger) -> None:
    folder = ledger.path.parent
    assert kvcached("floor", "llama", "64MiB", directory=folder).returncode == 0
    assert kvcached("floor", "llama", "80MiB", "--force", directory=folder).returncode == 0
    assert kvcached("floor", "llama", "64MiB", directory=folder).returncode == 0
    assert kvcached("priority", "llama", "-5", directory=folder).returncode == 0
    late = kvcached("limit", "llama", "96MiB", "--timeout", "0.1", directory=folder)
    assert (late.returncode, late.stdout) == (
        3,
        "llama: in progress, 128 MiB -> 128 MiB, 32 MiB to come\n",
    )
    assert ledger.view().instances[0].policy == Policy(96 * MIB, 64 * MIB, -5)
    refused = kvcached("limit", "llama", "2GiB", directory=folder)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("llama: refused: a limit of 2 GiB")


def test_metrics_have_base_units_and_a_line_for_every_size(ledger: Ledger) -> None:
    text = kvcached("metrics", "--once", directory=ledger.path.parent).stdout
    samples = {
        (sample.name, sample.labels.get("engine_instance")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    (view,) = ledger.view().instances
    assert samples["kvcached_device_capacity_bytes", None] == GIB
    for name in ("resident", "used", "cached", "idle", "promised", "limit", "floor"):
        assert samples[f"kvcached_{name}_bytes", "llama"] == getattr(view, f"{name}_bytes")
    assert samples["kvcached_mapped_bytes_total", "llama"] == view.num_mapped_bytes


def test_metrics_are_served_until_a_signal(ledger: Ledger) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [KVCACHED, "metrics", "--port", str(port), "--dir", str(ledger.path.parent)]
    with subprocess.Popen(command) as server:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                    text = answer.read().decode()
                break
            except OSError:
                assert time.monotonic() < deadline
                assert server.poll() is None
                time.sleep(0.05)
        server.terminate()
    assert 'kvcached_used_bytes{device="host"' in text
    assert server.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("limit", "llama", "-1GiB"), 1, "limit='-1GiB' is not a size"),
        (("limit", "../llama", "1GiB"), 1, "name='../llama' is not allowed"),
        (("priority", "llama", "high"), 2, "number"),
        (("metrics", "--port", "0"), 2, "1"),
        (("trim", "nobody"), 1, "no instance is named 'nobody'; there are llama"),
        (("trim", "--keep", "much"), 1, "--keep='much' is not a size"),
        (("top", "--interval", "0"), 2, "0.1"),
        (("top", "--interval", "inf"), 2, "1000000000"),
        (("trim", "--timeout", "inf"), 2, "1000000000"),
        (("run", "--need", "1MiB", "--wait", "inf", "--", "true"), 2, "1000000000"),
        (("limit", "llama", "9" * 400), 1, "is too large; use at most"),
        (("frobnicate",), 2, "frobnicate"),
    ],
)
def test_wrong_use_ends_with_a_message_and_its_code(
    ledger: Ledger, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = kvcached(*arguments, directory=ledger.path.parent)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_ledger_is_a_message_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "host.ledger").write_bytes(b"nonsense")
    for command in ("top", "list"):
        done = kvcached(command, directory=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("kvcached: the ledger")


def test_a_damaged_ledger_hides_no_other_and_fails_the_command(ledger: Ledger) -> None:
    folder = ledger.path.parent
    (folder / "GPU-1.ledger").write_bytes(b"nonsense")
    for arguments in (("top",), ("list", "--json")):
        done = kvcached(*arguments, directory=folder)
        assert done.returncode == 1
        assert "llama" in done.stdout
        assert done.stderr.startswith(f"kvcached: the ledger {folder}/GPU-1.ledger")
    for arguments in (("limit", "llama", "1GiB"), ("trim", "--timeout", "0")):
        done = kvcached(*arguments, directory=folder)
        assert (done.returncode, done.stdout.partition(":")[0]) == (1, "llama")
        assert done.stderr.startswith(f"kvcached: the ledger {folder}/GPU-1.ledger")
        assert done.stderr.count("\n") == 1
    assert ledger.view().instances[0].limit_bytes == GIB
    scraped = kvcached("metrics", "--once", directory=folder)
    assert scraped.returncode == 0
    assert 'kvcached_used_bytes{device="host"' in scraped.stdout
    assert "kvcached_unreadable_ledgers 1.0" in scraped.stdout


def test_the_command_imports_neither_torch_nor_an_engine(tmp_path: Path) -> None:
    script = (
        "import sys; from kvcached_core.cli import app; app.control.devices(__import__('pathlib')"
        ".Path('/nowhere')); print([m for m in ('torch', 'vllm', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
