"""Gates at which models take turns: who is let in, who waits, who is turned away."""

import asyncio
import itertools
import stat
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.shapes import SHAPES
from helpers.waiting import PATIENCE_SECONDS
from hypothesis import given, settings
from hypothesis import strategies as st
from multi_model import turns, upstream
from multi_model.errors import ModeError
from multi_model.model_files import make_folder, shape_bytes
from multi_model.turns import FirstComeFirstServed, TurnedAwayError


class Device:
    """Swaps that take as long as a test wants, and what ran when."""

    def __init__(self) -> None:
        self.swaps: list[int] = []
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def swap(self, model: int) -> None:
        self.swaps.append(model)
        await self.may_end.wait()
        if model == 9:
            raise RuntimeError("no file")


async def settle() -> None:
    """Let all tasks go as far as they can."""
    for _ in range(20):
        await asyncio.sleep(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, PATIENCE_SECONDS))


def test_the_running_model_serves_at_once_and_another_waits_until_it_is_idle() -> None:
    async def test() -> None:
        device = Device()
        gate = FirstComeFirstServed(device.swap)
        await gate.enter(0)
        other = asyncio.create_task(gate.enter(1))
        await settle()
        await gate.enter(0)  # although another one waits
        gate.leave(0)
        await settle()
        assert not other.done()
        gate.leave(0)
        await other
        assert device.swaps == [1]

    run(test())


def test_the_one_that_waits_longest_is_next_and_takes_its_models_others_along() -> None:
    async def test() -> None:
        device = Device()
        gate = FirstComeFirstServed(device.swap)
        await gate.enter(0)
        entered: list[str] = []

        async def ask(name: str, model: int) -> None:
            await gate.enter(model)
            entered.append(name)

        tasks = []
        for name, model in (("a", 1), ("b", 2), ("c", 1)):
            tasks.append(asyncio.create_task(ask(name, model)))
            await settle()
        gate.leave(0)
        await settle()
        assert entered == ["a", "c"]
        gate.leave(1)
        gate.leave(1)
        await asyncio.gather(*tasks)
        assert (entered, device.swaps, gate.num_turns) == (["a", "c", "b"], [1, 2], 2)

    run(test())


def test_nobody_is_let_in_while_a_swap_runs() -> None:
    async def test() -> None:
        device = Device()
        device.may_end.clear()
        gate = FirstComeFirstServed(device.swap)
        first = asyncio.create_task(gate.enter(1))
        await settle()
        back = asyncio.create_task(gate.enter(0))  # it ran a moment ago
        joined = asyncio.create_task(gate.enter(1))
        await settle()
        assert not any(task.done() for task in (first, back, joined))
        device.may_end.set()
        await asyncio.gather(first, joined)
        assert not back.done()
        gate.leave(1)
        gate.leave(1)
        await back
        assert device.swaps == [1, 0]

    run(test())


def test_what_is_beyond_the_limit_is_turned_away_also_behind_a_swap() -> None:
    async def test() -> None:
        gate = FirstComeFirstServed(Device().swap, limit=2)
        await gate.enter(0)
        await gate.enter(0)
        with pytest.raises(TurnedAwayError, match="2 requests at a time"):
            await gate.enter(0)
        waiting = [asyncio.create_task(gate.enter(1)) for _ in range(3)]
        await settle()
        gate.leave(0)
        gate.leave(0)
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(found) for found in done] == [type(None), type(None), TurnedAwayError]

    run(test())


def test_a_model_that_does_not_start_fails_its_requests_alone() -> None:
    async def test() -> None:
        gate = FirstComeFirstServed(Device().swap)
        with pytest.raises(ValueError, match="model 9 did not start: no file"):
            await gate.enter(9)
        await gate.enter(0)  # started again
        assert gate.num_turns == 2

    run(test())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=25))
def test_every_request_is_served_by_its_own_model_and_none_is_forgotten(
    asked: list[tuple[int, int]],
) -> None:
    async def test() -> None:
        device = Device()
        gate = FirstComeFirstServed(device.swap, limit=100)
        running = [0]
        inside = 0

        async def one(model: int, pauses: int) -> None:
            nonlocal inside
            await gate.enter(model)
            running[0] = model if not inside else running[0]
            inside += 1
            assert running[0] == model
            for _ in range(pauses):
                await asyncio.sleep(0)
            inside -= 1
            gate.leave(model)

        await asyncio.gather(*(one(*each) for each in asked))
        assert inside == 0

    run(test())


def interpreter(folder: Path, *lines: str) -> str:
    """Make a program that says these lines, in the place of an interpreter."""
    path = folder / "python"
    path.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_the_right_environment_of_the_other_kvcached_is_taken(tmp_path: Path) -> None:
    python = interpreter(tmp_path, "kvcached 0.1.6", "kvcached-elastic none", "vllm 0.24.0")
    assert upstream.check(python, "0.24.0")["vllm"] == "0.24.0"
    assert upstream.check(python, None)["vllm"] == "0.24.0"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("kvcached none", "kvcached-elastic none", "vllm 1"), "has kvcached none, not 0.1.6"),
        (("kvcached 0.1.5", "kvcached-elastic none", "vllm 1"), "has kvcached 0.1.5, not 0.1.6"),
        (("kvcached 0.1.6", "kvcached-elastic 0.2.0", "vllm 1"), "exclude each other"),
        (("kvcached 0.1.6", "kvcached-elastic none", "vllm none"), "has no vllm"),
        (
            ("kvcached 0.1.6", "kvcached-elastic none", "vllm 0.24.0"),
            "has vllm 0.24.0, other modes have 0.26.0",
        ),
    ],
)
def test_a_wrong_environment_is_refused_with_what_it_has(
    tmp_path: Path, lines: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ModeError, match=message):
        upstream.check(interpreter(tmp_path, *lines), "0.26.0")


@pytest.mark.parametrize(
    ("python", "message"), [("", "--upstream-python"), ("/nowhere/python", "'/nowhere/python'")]
)
def test_an_interpreter_that_is_not_there_is_named(python: str, message: str) -> None:
    with pytest.raises(ModeError, match=message):
        upstream.check(python, None)


def test_the_sizes_of_shapes_are_those_of_the_real_models(tmp_path: Path) -> None:
    assert shape_bytes("llama-8b") == 16_060_522_496
    assert shape_bytes("llama-1b") == 2_471_628_800
    assert {"llama-8b", "llama-1b"} <= set(SHAPES)
    folder = make_folder(tmp_path / "model", "llama-1b")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size == pytest.approx(2_471_628_800, abs=5)


def test_a_model_that_is_woken_serves_who_waited_although_all_others_are_out_of_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = itertools.count()
    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: next(looks)))
    awake = [0]

    async def fall_asleep(model: int) -> None:
        assert model == awake[-1]
        await settle()  # the others come meanwhile

    async def wake_up(model: int) -> None:
        awake.append(model)
        assert len(awake) < 10

    async def test() -> None:
        gate = turns.TakingTurns(fall_asleep, wake_up, patience_seconds=0.5)
        served: list[int] = []

        async def ask(model: int) -> None:
            await gate.enter(model)
            served.append(model)
            await settle()
            gate.leave(model)

        await asyncio.gather(*(ask(model) for model in (1, 2, 3, 1, 2, 3, 4)))
        assert served == [1, 1, 2, 2, 3, 3, 4]

    run(test())
    assert awake == [0, 1, 2, 3, 4]


def test_of_several_awake_the_idle_one_that_was_asked_longest_ago_sleeps() -> None:
    turned: list[str] = []

    async def fall_asleep(model: int) -> None:
        turned.append(f"{model} sleeps")

    async def wake_up(model: int) -> None:
        turned.append(f"{model} wakes")

    async def test() -> None:
        gate = turns.TakingTurns(fall_asleep, wake_up, awake=(0, 1))
        await gate.enter(0)
        await gate.enter(1)
        gate.leave(1)
        await gate.enter(2)  # 0 was asked before 1, and is busy
        assert turned == ["1 sleeps", "2 wakes"]
        await gate.enter(0)  # it is awake all the time
        other = asyncio.create_task(gate.enter(1))
        await settle()
        assert not other.done()
        gate.leave(0)
        gate.leave(0)
        await other
        assert turned[2:] == ["0 sleeps", "1 wakes"]
        assert gate.num_turns == 2

    run(test())


def test_out_of_patience_one_of_several_lets_no_more_in_and_the_others_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    async def test() -> None:
        gate = turns.TakingTurns(nothing, nothing, awake=(0, 1), patience_seconds=5.0)
        now[0] = 1.0
        await gate.enter(0)
        await gate.enter(1)
        sleeper = asyncio.create_task(gate.enter(2))
        await settle()
        now[0] = 7.0
        held = asyncio.create_task(gate.enter(0))
        await settle()
        await gate.enter(1)
        assert not held.done()
        gate.leave(0)
        await sleeper
        gate.leave(2)
        await held
        assert gate.num_turns == 2

    run(test())


async def nothing(_model: int) -> None:
    """Put a model to sleep, or wake it."""
