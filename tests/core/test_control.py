"""Steering instances from outside."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import await_that

from kvcached_core import control
from kvcached_core.control import Outcome
from kvcached_core.errors import ConfigError, LedgerBusyError, LedgerError
from kvcached_core.ledger.bell import Doorbell
from kvcached_core.ledger.entry import SCHEDULER_SECONDS
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.lock import FileLock
from kvcached_core.ledger.opening import doorbell_path, ledger_directory
from kvcached_core.ledger.policy import Policy
from kvcached_core.ledger.view import InstanceView
from kvcached_core.ledger.weights import WeightsWish
from kvcached_core.units import GIB, MIB

PAGE = 16 * MIB


class Engine:
    """An instance that gives what it is asked for when its bell rings."""

    def __init__(self, ledger: Ledger, name: str, num_cached: int) -> None:
        self.ledger = ledger
        self.row = ledger.register(name=name, engine="test")
        self.cached_bytes = num_cached * PAGE
        ledger.promise(self.row, self.cached_bytes, PAGE)
        ledger.settle(
            self.row, mapped_bytes=self.cached_bytes, used_bytes=0, cached_bytes=self.cached_bytes
        )
        self.is_deaf = threading.Event()
        self.num_wishes = 0
        self.bell = Doorbell(doorbell_path(ledger.path, self.row), self.answer)

    def answer(self) -> None:
        if self.is_deaf.is_set():
            return
        self.fulfil(self.ledger.weights_wish(self.row))
        wanted = self.ledger.wanted(self.row)
        give = wanted.asked_bytes
        self.cached_bytes -= give
        self.ledger.acknowledge(self.row, give, num_asked=wanted.num_asked)
        self.ledger.settle(
            self.row, unmapped_bytes=give, used_bytes=0, cached_bytes=self.cached_bytes
        )

    def fulfil(self, wish: WeightsWish) -> None:
        seen = self.view()
        if wish is WeightsWish.SLEEP:
            self.ledger.settle_weights(self.row, unmapped_bytes=seen.weights_bytes)
        elif wish is WeightsWish.WAKE:
            missing = seen.weights_needed_bytes - seen.weights_bytes
            self.ledger.settle_weights(self.row, mapped_bytes=missing)
        self.num_wishes += wish is not WeightsWish.NONE
        self.ledger.end_wish(self.row, wish)

    def view(self) -> InstanceView:
        views = self.ledger.view().instances
        return next(view for view in views if view.row == self.row)

    def policy(self) -> Policy:
        return self.view().policy


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return ledger_directory(tmp_path / "kv")


@pytest.fixture
def pair(directory: Path) -> Iterator[tuple[Engine, Engine]]:
    with Ledger(directory / "host.ledger", GIB) as ledger:
        engines = Engine(ledger, "a", 10), Engine(ledger, "b", 40)
        yield engines
        for engine in engines:
            engine.bell.close()


def test_a_limit_makes_an_instance_give_what_is_above_it(
    directory: Path, pair: tuple[Engine, Engine]
) -> None:
    for before in (40 * PAGE, 4 * PAGE):
        answer = control.set_limit("b", "64MiB", directory=directory)
        assert answer.outcome is Outcome.APPLIED
        assert (answer.before_bytes, answer.after_bytes) == (before, 4 * PAGE)
    assert control.set_limit("b", "50%", directory=directory).outcome is Outcome.APPLIED
    assert pair[1].policy() == Policy(limit_bytes=GIB // 2)
    assert control.set_limit("b", "none", directory=directory).outcome is Outcome.APPLIED
    assert pair[1].policy() == Policy()


def test_what_does_not_hold_in_time_is_in_progress_with_the_bytes_to_come(
    directory: Path, pair: tuple[Engine, Engine]
) -> None:
    pair[1].is_deaf.set()
    answer = control.set_limit("b", "64MiB", directory=directory, wait_seconds=0.05)
    assert (answer.outcome, answer.remaining_bytes) == (Outcome.IN_PROGRESS, 36 * PAGE)
    assert "in progress" in control.describe(answer)
    pair[1].is_deaf.clear()
    assert control.set_limit("b", "64MiB", directory=directory).outcome is Outcome.APPLIED


def test_a_floor_is_freed_by_those_who_can_give(
    directory: Path, pair: tuple[Engine, Engine]
) -> None:
    answer = control.set_floor("a", "512MiB", directory=directory)
    assert answer.outcome is Outcome.APPLIED
    assert pair[1].cached_bytes == GIB - 32 * PAGE


def test_a_floor_is_asked_for_also_where_somebody_has_the_lock_just_then(
    directory: Path, pair: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing_to_floor, take_later = control._missing_to_floor, FileLock._take_later
    with Ledger(directory / "host.ledger") as holder:
        enter = iter([holder._enter_patiently])

        def look_and_hold(*arguments: Any) -> int:
            found = missing_to_floor(*arguments)
            next(enter, lambda: None)()
            return found

        def let_go_of_who_may_wait(lock: FileLock, seconds: float) -> bool:
            if seconds > SCHEDULER_SECONDS:
                holder._exit()
            return take_later(lock, seconds)

        monkeypatch.setattr(control, "_missing_to_floor", look_and_hold)
        monkeypatch.setattr(FileLock, "_take_later", let_go_of_who_may_wait)
        answer = control.set_floor("a", "512MiB", directory=directory)
        assert answer.outcome is Outcome.APPLIED
        assert pair[1].cached_bytes == GIB - 32 * PAGE


def test_a_refusal_says_why_and_changes_nothing(
    directory: Path, pair: tuple[Engine, Engine]
) -> None:
    control.set_floor("b", "60%", directory=directory)
    refused = control.set_floor("a", "50%", directory=directory)
    assert refused.outcome is Outcome.REFUSED
    assert "are more than the 1 GiB" in refused.reason
    assert pair[0].policy() == Policy()
    assert control.set_priority("a", 5000, directory=directory).outcome is Outcome.REFUSED


def test_a_floor_beside_which_a_neighbours_longest_request_never_fits_has_to_be_forced(
    directory: Path, pair: tuple[Engine, Engine]
) -> None:
    ledger = pair[1].ledger
    ledger.describe(pair[1].row, page_bytes=PAGE, virtual_bytes=GIB, least_bytes=GIB // 2)
    refused = control.set_floor("a", "60%", directory=directory)
    assert refused.outcome is Outcome.REFUSED
    assert "the longest request of 'b' needs 512 MiB" in refused.reason
    assert pair[0].policy() == Policy()
    forced = control.set_floor("a", "60%", directory=directory, is_forced=True)
    assert forced.outcome is Outcome.APPLIED
    assert pair[0].policy().floor_bytes == GIB * 6 // 10


def test_who_places_models_reads_their_weights_and_what_a_token_takes(
    directory: Path, pair: tuple[Engine, Engine]
) -> None:
    engine = pair[0]
    engine.ledger.describe(engine.row, page_bytes=PAGE, virtual_bytes=GIB, token_bytes=4096)
    engine.ledger.describe_weights(engine.row, 8 * PAGE)
    engine.ledger.settle_weights(engine.row, mapped_bytes=3 * PAGE)
    (device,) = control.devices(directory)
    row = next(row for row in device.instances if row.name == "a")
    assert (row.weights_bytes, row.weights_needed_bytes) == (3 * PAGE, 8 * PAGE)
    assert row.token_bytes == 4096


def test_an_idle_instance_gives_its_weights_and_gets_them_back(
    directory: Path, pair: tuple[Engine, Engine]
) -> None:
    engine = pair[0]
    engine.ledger.describe_weights(engine.row, 8 * PAGE)
    engine.ledger.settle_weights(engine.row, mapped_bytes=8 * PAGE)
    for _ in range(2):  # the second time there is nothing to do
        asleep = control.sleep("a", directory=directory)
        assert (asleep.outcome, asleep.after_bytes) == (Outcome.APPLIED, 10 * PAGE)
        await_that(lambda: engine.view().weights_wish == WeightsWish.NONE)
        assert (engine.num_wishes, engine.view().weights_bytes) == (1, 0)
    awake = control.wake("a", directory=directory)
    assert (awake.outcome, awake.after_bytes) == (Outcome.APPLIED, 18 * PAGE)
    await_that(lambda: engine.view().weights_wish == WeightsWish.NONE)


def test_a_sleep_and_a_wake_that_take_longer_are_in_progress(
    directory: Path, pair: tuple[Engine, Engine]
) -> None:
    engine = pair[0]
    engine.ledger.describe_weights(engine.row, 8 * PAGE)
    engine.ledger.settle_weights(engine.row, mapped_bytes=3 * PAGE)
    engine.is_deaf.set()
    for steer, num_pages in ((control.sleep, 3), (control.wake, 5)):
        answer = steer("a", directory=directory, wait_seconds=0.0)
        assert (answer.outcome, answer.remaining_bytes) == (
            *(Outcome.IN_PROGRESS, num_pages * PAGE),
        )
    assert engine.view().weights_wish == WeightsWish.WAKE


def test_who_cannot_sleep_or_wake_is_left_alone(
    directory: Path, pair: tuple[Engine, Engine]
) -> None:
    engine = pair[0]
    for steer in (control.sleep, control.wake):
        refused = steer("a", directory=directory)
        assert refused.outcome is Outcome.REFUSED
        assert "start it with KVCACHED_WEIGHTS=yield" in refused.reason
    engine.ledger.describe_weights(engine.row, 8 * PAGE)
    engine.ledger.settle_weights(engine.row, mapped_bytes=8 * PAGE)
    for say in (
        lambda: engine.ledger.announce(engine.row, PAGE, is_waking=True),
        lambda: engine.ledger.settle(engine.row, used_bytes=2 * PAGE, cached_bytes=0),
    ):
        engine.ledger.announce(engine.row, 0)
        say()
        refused = control.sleep("a", directory=directory)
        assert (refused.outcome, engine.num_wishes) == (Outcome.REFUSED, 0)
        assert "'a' has requests" in refused.reason


def test_a_trim_leaves_weights_where_they_are(directory: Path, pair: tuple[Engine, Engine]) -> None:
    engine = pair[0]
    engine.ledger.describe_weights(engine.row, 8 * PAGE)
    engine.ledger.settle_weights(engine.row, mapped_bytes=8 * PAGE)
    (answer,) = control.trim(["a"], directory=directory)
    assert (answer.outcome, answer.after_bytes) == (Outcome.APPLIED, 8 * PAGE)


def test_priorities_are_set(directory: Path, pair: tuple[Engine, Engine]) -> None:
    assert control.set_priority("a", -5, directory=directory).outcome is Outcome.APPLIED
    assert pair[0].policy().priority == -5


@pytest.mark.parametrize("size", ["-1GiB", "lots", "101%", ""])
def test_no_size_is_an_error_and_changes_nothing(
    directory: Path, pair: tuple[Engine, Engine], size: str
) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        control.set_limit("a", size, directory=directory)
    assert pair[0].policy() == Policy()


def test_an_unknown_or_impossible_name_is_an_error(
    directory: Path, pair: tuple[Engine, Engine]
) -> None:
    with pytest.raises(LedgerError, match="no instance is named 'c'; there are a, b"):
        control.set_limit("c", "1GiB", directory=directory)
    with pytest.raises(ConfigError, match="not allowed"):
        control.set_limit("../a", "1GiB", directory=directory)


def test_an_instance_on_two_devices_is_steered_on_both_or_on_none(
    directory: Path, pair: tuple[Engine, Engine]
) -> None:
    with Ledger(directory / "other.ledger", 2 * GIB) as other:
        row = other.register(name="a", engine="test")
        other.describe(row, page_bytes=PAGE, virtual_bytes=GIB, least_bytes=GIB)
        refused = control.set_limit("a", "512MiB", directory=directory)
        assert refused.outcome is Outcome.REFUSED
        assert pair[0].policy() == other.view().instances[0].policy == Policy()
        assert control.set_limit("a", "100%", directory=directory).outcome is Outcome.APPLIED
        assert other.view().instances[0].limit_bytes == 2 * GIB


def test_a_ledger_that_cannot_be_read_keeps_nobody_from_what_is_done_on_others(
    directory: Path, pair: tuple[Engine, Engine]
) -> None:
    (directory / "GPU-1.ledger").write_bytes(b"nonsense")
    engine = pair[0]
    engine.ledger.describe_weights(engine.row, 8 * PAGE)
    engine.ledger.settle_weights(engine.row, mapped_bytes=8 * PAGE)
    answers = [
        control.set_limit("a", "512MiB", directory=directory),
        control.set_floor("a", "32MiB", directory=directory),
        control.set_priority("a", 3, directory=directory),
        control.sleep("a", directory=directory),
        control.wake("a", directory=directory),
        *control.trim([], directory=directory),
        *control.trim(["a"], directory=directory),
    ]
    assert {answer.outcome for answer in answers} == {Outcome.APPLIED}
    assert engine.policy() == Policy(512 * MIB, 32 * MIB, 3)
    assert (engine.num_wishes, pair[1].cached_bytes) == (2, 0)
    answers.append(control.set_priority("a", 5000, directory=directory))
    assert answers[-1].outcome is Outcome.REFUSED
    for answer in answers:
        (problem,) = answer.problems
        assert "GPU-1.ledger is damaged" in problem


def test_where_no_ledger_can_be_read_or_a_name_is_only_there_that_is_an_error(
    directory: Path, pair: tuple[Engine, Engine]
) -> None:
    (directory / "GPU-1.ledger").write_bytes(b"nonsense")
    with pytest.raises(LedgerError, match=r"named 'c'; there are a, b; the ledger .*GPU-1\.ledger"):
        control.trim(["a", "c"], directory=directory)
    assert pair[0].cached_bytes == 10 * PAGE
    for engine in pair:
        engine.ledger.unregister(engine.row)
    with pytest.raises(LedgerError, match=r"^the ledger .*GPU-1\.ledger is damaged"):
        control.trim([], directory=directory)


def test_a_device_whose_lock_somebody_holds_keeps_no_other_from_being_trimmed(
    directory: Path, pair: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger(directory / "other.ledger", GIB) as other:
        for name in ("c", "d"):
            other.register(name=name, engine="test")
        ask, tried = Ledger.ask, []

        def refuse(ledger: Ledger, *args: Any) -> int:
            if ledger.path != other.path:
                return ask(ledger, *args)
            tried.append(ledger.device)
            raise LedgerBusyError("somebody holds its lock")

        monkeypatch.setattr(Ledger, "ask", refuse)
        answers = control.trim([], directory=directory)
        assert {answer.instance for answer in answers} == {"a", "b"}
        assert {answer.problems for answer in answers} == {("somebody holds its lock",)}
        assert [engine.cached_bytes for engine in pair] == [0, 0]
        assert tried == ["other"]  # who waits for a lock waits for seconds
        with pytest.raises(LedgerError, match="somebody holds its lock"):
            control.trim(["d"], directory=directory)


def test_who_gives_up_on_one_device_leaves_the_other_as_it_was(
    directory: Path, pair: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger(directory / "other.ledger", 2 * GIB) as other:
        other.register(name="a", engine="test")
        change = Ledger.change_policy

        def interrupt(ledger: Ledger, *args: Any, **changes: Any) -> Any:
            if ledger.path == other.path:
                raise KeyboardInterrupt
            return change(ledger, *args, **changes)

        monkeypatch.setattr(Ledger, "change_policy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            control.set_limit("a", "512MiB", directory=directory)
        assert pair[0].policy() == other.view().instances[0].policy == Policy()


def test_a_refusal_on_one_device_leaves_what_somebody_decided_meanwhile_on_the_other(
    directory: Path, pair: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger(directory / "other.ledger", 2 * GIB) as other:
        row = other.register(name="a", engine="test")
        other.describe(row, page_bytes=PAGE, virtual_bytes=GIB, least_bytes=GIB)
        undo = Ledger.undo_policy

        def decide_first(ledger: Ledger, *args: Any) -> None:
            pair[0].ledger.change_policy(pair[0].row, priority=9, limit_bytes=GIB)
            undo(ledger, *args)

        monkeypatch.setattr(Ledger, "undo_policy", decide_first)
        refused = control.set_limit("a", "512MiB", directory=directory)
    assert refused.outcome is Outcome.REFUSED
    assert pair[0].policy() == Policy(limit_bytes=GIB, priority=9)


def test_who_waits_is_woken_when_a_floor_is_lowered(
    directory: Path, pair: tuple[Engine, Engine]
) -> None:
    control.set_floor("a", "512MiB", directory=directory)
    rang = threading.Event()
    waiting = pair[0].ledger.register(name="c", engine="test")
    bell = Doorbell(doorbell_path(pair[0].ledger.path, waiting), rang.set)
    pair[1].is_deaf.set()
    assert pair[0].ledger.promise(waiting, 40 * PAGE, PAGE) == 0
    pair[0].ledger.ask_peers(waiting, 40 * PAGE)
    control.set_floor("a", "none", directory=directory)
    assert rang.wait(60)
    bell.close()
