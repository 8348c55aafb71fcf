"""The servers of a mode, in the order in which they are started; no process runs."""

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
from multi_model.fleet import Fleet
from multi_model.modes import Site, members
from multi_model.swapping import SwappingFleet

from kvcached_core.units import GIB

SITE = Site(is_host=True, kv_bytes_per_token=1024, pool_bytes=3 * GIB)


class Process:
    """A process that ends when it is told to."""

    def __init__(self, said: list[str], name: str) -> None:
        self.said, self.name = said, name

    def poll(self) -> None:
        """It runs."""

    def send_signal(self, number: int) -> None:
        self.said.append(f"{self.name} signal {number}")

    def wait(self, _seconds: float) -> int:
        return 0


class Server:
    """A server that writes down what is done with it."""

    num_made = 0

    def __init__(self, said: list[str], name: str) -> None:
        Server.num_made += 1
        self.said, self.name, self.url = said, name, f"http://{name}.{Server.num_made}"
        self.process = Process(said, name)

    def post(self, path: str, body: Any, seconds: float) -> Any:
        assert seconds > 0
        asked = f" {body['model']}: {len(body['prompt'])} and {body['max_tokens']}" if body else ""
        self.said.append(f"{self.name}{path}{asked}")
        return type("Answer", (), {"raise_for_status": lambda _self: None})()

    def kill(self) -> None:
        self.said.append(f"{self.name} ends")


class Running:
    """What stands for `Servers`."""

    def __init__(self, said: list[str]) -> None:
        self.said = said
        self.by_name: dict[str, Server] = {}

    def __getitem__(self, name: str) -> Server:
        return self.by_name[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_words: object) -> None:
        self.said.append("all end")

    def follow(self, found: Any, _model: Path, *, launch: Any) -> Server:
        assert launch is None
        self.said.append(f"{found.name} starts")
        self.by_name[found.name] = Server(self.said, found.name)
        return self.by_name[found.name]

    def wait_ready(self, *names: str, seconds: float) -> None:
        assert seconds > 0
        self.said.append(f"{' '.join(names) or 'all'} ready")


def made(kind: type[Fleet], mode: str, folder: Path, said: list[str]) -> Fleet:
    chosen = members(mode, SITE, ["vllm"] * 3, [], folder)
    fleet = kind(mode, chosen, SITE, [folder] * 3, folder)
    fleet._running = Running(said)  # type: ignore[assignment]  # no process runs here
    return fleet


def first(name: str) -> str:
    """Return what a server is asked before a schedule begins."""
    return f"{name}/v1/completions {name}: 3 and 1"


def started(said: Sequence[str], name: str) -> int:
    return said.index(f"{name} starts")


def test_each_model_sleeps_before_the_next_one_starts_and_the_first_wakes_at_last(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    with made(Fleet, "sleep-swap", tmp_path, said):
        pass
    for name, after in (("m0", "m1"), ("m1", "m2")):
        assert started(said, name) < said.index(f"{name}/sleep?level=1") < started(said, after)
    assert said[-2:] == ["m0/wake_up", "all end"]


def test_models_that_fit_start_together_and_all_of_them_sleep_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Site, "num_starting", lambda *_: 2)
    said: list[str] = []
    with made(Fleet, "sleep-swap", tmp_path, said):
        pass
    assert said[:3] == ["m0 starts", "m1 starts", "m0 m1 ready"]
    assert said[3:7] == [first("m0"), "m0/sleep?level=1", first("m1"), "m1/sleep?level=1"]
    assert said[7] == "m2 starts"
    assert said[-2:] == ["m0/wake_up", "all end"]


def test_as_many_as_may_be_are_awake_when_a_schedule_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SITE", replace(SITE, num_awake=2))
    said: list[str] = []
    with made(Fleet, "sleep-swap", tmp_path, said) as fleet:
        assert said[-2:] == ["m0/wake_up", "m1/wake_up"]
        fleet.sleep(0)
        fleet.wake_up(2)
        said.clear()
        assert fleet.gate() is not None
        fleet.sleep(1)
        assert fleet.gate() is not None
        assert said == ["m1/sleep?level=1", "m0/wake_up"]


@pytest.mark.parametrize("is_cut_off", [False, True])
def test_the_next_schedule_begins_with_the_model_that_is_awake(
    tmp_path: Path, *, is_cut_off: bool
) -> None:
    said: list[str] = []

    async def ask(fleet: Fleet, model: int) -> None:
        gate = fleet.gate()
        assert gate is not None
        await gate.enter(model)

    with made(Fleet, "sleep-swap", tmp_path, said) as fleet:
        asyncio.run(ask(fleet, 2))
        if is_cut_off:
            fleet.sleep(2)
        said.clear()
        asyncio.run(ask(fleet, 2))
        woken = ["m0/wake_up", "m0/sleep?level=1", "m2/wake_up"]
        assert said == (woken if is_cut_off else [])


def test_a_model_that_sleeps_holds_no_memory(tmp_path: Path) -> None:
    with made(Fleet, "sleep-swap", tmp_path, []) as fleet:
        assert fleet._resident_bytes() == [3 * GIB, 0, 0]
        fleet.sleep(0)
        assert fleet._resident_bytes() == [0, 0, 0]
        fleet.wake_up(2)
        assert fleet._resident_bytes() == [0, 0, 3 * GIB]


def test_one_server_runs_at_a_time_and_its_address_is_the_new_one(tmp_path: Path) -> None:
    said: list[str] = []
    with made(SwappingFleet, "swap", tmp_path, said) as fleet:
        assert isinstance(fleet, SwappingFleet)
        assert said[-3:] == ["m0 starts", "m0 ready", first("m0")]
        del said[:]
        targets = fleet.targets
        before = targets[0].url
        fleet.swap(2)
        assert said == ["m0 signal 15", "m0 ends", "m2 starts", "m2 ready"]
        assert targets[2].url.startswith("http://m2.")
        fleet.swap(0)
        assert targets[0].url != before
        assert fleet.num_preemptions() == [None] * 3
    assert said[-1] == "all end"


def test_each_model_that_will_be_swapped_in_was_started_and_asked_before(tmp_path: Path) -> None:
    said: list[str] = []
    with made(SwappingFleet, "swap", tmp_path, said) as fleet:
        up = [line.removesuffix(" starts") for line in said if line.endswith("starts")]
        assert up == ["m1", "m2", "m0"]
        assert [line for line in said if "/" in line] == [first(name) for name in up]
        ended = [line for line in said if line.endswith("ends")]
        assert ended == ["m1 ends", "m2 ends"]
        assert [bool(each) for each in fleet._resident_bytes()] == [True, False, False]


@pytest.mark.parametrize("mode", ["static", "elastic"])
def test_every_server_is_asked_once_before_a_schedule_begins(tmp_path: Path, mode: str) -> None:
    said: list[str] = []
    with made(Fleet, mode, tmp_path, said):
        assert said[-4:] == ["all ready", *map(first, ("m0", "m1", "m2"))]


@pytest.mark.parametrize("mode", ["static", "elastic"])
def test_models_of_other_modes_neither_sleep_nor_take_turns(tmp_path: Path, mode: str) -> None:
    said: list[str] = []
    with made(Fleet, mode, tmp_path, said) as fleet:
        assert fleet.gate() is None
    assert not [line for line in said if "sleep" in line or "wake" in line]
