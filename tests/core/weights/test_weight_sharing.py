"""Of processes that start with one host copy one fills it; a killed one harms no other."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
from helpers.forked import exit_code_of_child
from helpers.weight_copies import (
    KEY,
    LAYOUT,
    OTHER_KEY,
    WHOLE_BYTES,
    Start,
    check,
    config,
    held_bytes,
    image,
    opened,
    start,
)
from helpers.weight_pages import Pages, Pins

from kvcached_core.config import Config
from kvcached_core.ledger.lock import take_byte
from kvcached_core.units import GIB
from kvcached_core.weights import host_file
from kvcached_core.weights.host_budget import HostBudget
from kvcached_core.weights.host_bytes import HostBytes
from kvcached_core.weights.host_copy import HostCopy, complete
from kvcached_core.weights.host_file import SharedFile
from kvcached_core.weights.open_copy import open_copy

__all__ = ["config", "image", "opened", "start"]


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_page(page: int) -> Callable[[pytest.MonkeyPatch, Callable[[], object]], None]:
    """Return what lets something happen before a page is copied."""

    def plant(patch: pytest.MonkeyPatch, happen: Callable[[], object]) -> None:
        copy_out = Pages.copy_out

        def watched(pages: Pages, number: int, host_address: int) -> None:
            if number == page:
                happen()
            copy_out(pages, number, host_address)

        patch.setattr(Pages, "copy_out", watched)

    return plant


def before(owner: type, verb: str) -> Callable[[pytest.MonkeyPatch, Callable[[], object]], None]:
    """Return what lets something happen in the place of a step."""
    return lambda patch, happen: patch.setattr(owner, verb, lambda *_, **__: happen())


POINTS = {
    "locked": before(SharedFile, "allocate"),
    "long enough": before(HostBytes, "touch"),
    "touched": before(SharedFile, "reserve"),
    "reserved": at_page(0),
    "half filled": at_page(2),
    "filled": before(HostBytes, "checksums"),
    "summed": before(SharedFile, "publish"),
    "record written": before(Path, "replace"),
}


def run_engine(config: Config, pages: Pages) -> HostCopy | None:
    copy = open_copy(config, KEY, LAYOUT, HostBudget(config, GIB))
    if copy is not None:
        complete(copy, Pins(), pages, Event())
    return copy


def kill_at(point: str, config: Config) -> None:
    """Let a process be killed while it fills the copy."""

    def fill() -> None:
        with pytest.MonkeyPatch.context() as patch:
            POINTS[point](patch, die)
            run_engine(config, Pages.of(1))

    assert exit_code_of_child(fill) == -signal.SIGKILL


@pytest.mark.parametrize("point", POINTS)
def test_a_copy_whose_filler_was_killed_is_filled_anew(
    start: Start, config: Config, image: Path, point: str
) -> None:
    kill_at(point, config)
    assert image.exists()
    pages = Pages.of(1)
    assert start(pages).is_shared
    assert pages.copied == [0, 1, 2, 3]
    assert held_bytes(config) == WHOLE_BYTES
    again = Pages.of(1)
    start(again)
    assert again.copied == []
    assert sorted(path.suffix for path in image.parent.iterdir()) == [".image", ".json", ".lock"]


def test_a_copy_that_fits_the_budget_once_is_filled_anew_there(config: Config) -> None:
    tight = config.model_copy(update={"host_budget": WHOLE_BYTES})
    kill_at("half filled", tight)
    copy = run_engine(tight, Pages.of(1))
    assert copy is not None
    assert copy.is_shared
    check(copy, Pages.of(1))
    copy.close()


def test_a_copy_whose_filler_was_killed_with_other_weights_is_not_believed(
    start: Start, config: Config, image: Path
) -> None:
    def fill() -> None:
        with pytest.MonkeyPatch.context() as patch:
            POINTS["half filled"](patch, die)
            run_engine(config, Pages.of(2))

    start(Pages.of(1)).close()
    assert exit_code_of_child(fill) == -signal.SIGKILL
    assert not image.with_suffix(".json").exists()
    pages = Pages.of(1)
    start(pages)
    assert pages.copied == [0, 1, 2, 3]


@pytest.mark.parametrize("point", POINTS)
def test_what_a_killed_filler_left_is_removed_for_the_next_model(
    start: Start, config: Config, image: Path, point: str
) -> None:
    kill_at(point, config)
    start(Pages.of(2), OTHER_KEY)
    assert not image.exists()
    assert held_bytes(config) == WHOLE_BYTES
    assert {path.stem for path in image.parent.iterdir()} == {OTHER_KEY.digest, "budget"}


def test_a_copy_outlives_a_user_that_was_killed(start: Start, config: Config) -> None:
    def use_and_die() -> None:
        run_engine(config, Pages.of(1))
        die()

    assert exit_code_of_child(use_and_die) == -signal.SIGKILL
    pages = Pages.of(1)
    start(pages)
    assert pages.copied == []


def test_a_user_that_is_killed_while_it_writes_back_changes_nothing_for_others(
    start: Start, config: Config
) -> None:
    def write_back_and_die() -> None:
        pages = Pages.of(1)
        copy = run_engine(config, pages)
        assert copy is not None
        pages.content[:] = Pages.of(2).content
        with pytest.MonkeyPatch.context() as patch:
            at_page(2)(patch, die)
            copy.write_back([0, 1, 2], pages)

    first = start(Pages.of(1))
    assert exit_code_of_child(write_back_and_die) == -signal.SIGKILL
    check(first, Pages.of(1))
    assert held_bytes(config) == WHOLE_BYTES
    again = Pages.of(1)
    start(again)
    assert again.copied == []


@contextmanager
def child_at(point: str, config: Config) -> Iterator[int]:
    """Give the process id of a child that stays at a point of the filling."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:

                def stay() -> None:
                    os.write(writing, b"!")
                    signal.pause()

                POINTS[point](patch, stay)
                run_engine(config, Pages.of(1))
        finally:
            os._exit(1)
    try:
        assert os.read(reading, 1) == b"!"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)


class Watched(Event):
    """Says when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_waited_for = Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.is_waited_for.set()
        return super().wait(timeout)


@pytest.mark.parametrize("point", ["locked", "half filled", "record written"])
def test_who_waits_for_a_filler_that_is_killed_fills_the_copy(
    opened: Callable[..., HostCopy | None], config: Config, point: str
) -> None:
    stop, pages = Watched(), Pages.of(1)
    with ThreadPoolExecutor(1) as threads:
        with child_at(point, config):
            waiting = threads.submit(opened, stop=stop)
            assert stop.is_waited_for.wait(60)
            assert not waiting.done()
        copy = waiting.result(60)
    assert copy is not None
    assert not copy.is_complete
    assert complete(copy, Pins(), pages, stop)
    assert pages.copied == [0, 1, 2, 3]
    check(copy, pages)
    assert held_bytes(config) == WHOLE_BYTES


def test_who_waits_for_a_filler_can_be_stopped(
    opened: Callable[..., HostCopy | None], config: Config
) -> None:
    stop = Watched()
    with child_at("half filled", config), ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(opened, stop=stop)
        assert stop.is_waited_for.wait(60)
        stop.set()
        assert waiting.result(60) is None


def test_who_waits_for_a_filler_that_gives_up_has_a_file_that_others_find(
    opened: Callable[..., HostCopy | None], start: Start
) -> None:
    first, pages, stop = opened(), Pages.of(1), Watched()
    assert first is not None
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(opened, stop=stop)
        assert stop.is_waited_for.wait(60)
        first.close()
        second = waiting.result(60)
    assert second is not None
    assert complete(second, Pins(), pages, Event())
    again = Pages.of(1)
    start(again)
    assert again.copied == []


def test_a_file_that_is_removed_before_it_is_locked_is_not_filled(
    start: Start, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removals = [image.unlink]

    def lose_once(fd: int, number: int) -> bool:
        if removals:
            removals.pop()()
        return take_byte(fd, number)

    monkeypatch.setattr(host_file, "take_byte", lose_once)
    start(Pages.of(1))
    again = Pages.of(1)
    start(again)
    assert again.copied == []


def test_who_waits_attaches_to_what_the_filler_finished(
    opened: Callable[..., HostCopy | None], start: Start
) -> None:
    first, pages, stop = opened(), Pages.of(1), Watched()
    assert first is not None
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(opened, stop=stop)
        assert stop.is_waited_for.wait(60)
        assert complete(first, Pins(), pages, Event())
        second = waiting.result(60)
    assert second is not None
    assert second.is_complete
    assert second.agrees(pages)
    check(second, pages)


def test_of_many_that_start_at_once_one_fills(config: Config, tmp_path: Path) -> None:
    go_reading, go = os.pipe()
    reading, writing = os.pipe()
    pids = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(go)
                os.read(go_reading, 1)
                pages = Pages.of(1)
                copy = run_engine(config, pages)
                assert copy is not None
                check(copy, pages)
                os.write(writing, bytes([len(pages.copied)]))
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    os.close(go)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert sorted(os.read(reading, 4)) == [0, 0, 0, 4]
    for fd in (go_reading, reading, writing):
        os.close(fd)


def test_a_forked_child_has_nothing_of_a_copy(start: Start, config: Config, image: Path) -> None:
    copy = start(Pages.of(1))
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        has_nothing = copy.page_address(0) == 0  # whatever lies there in the child is not ours
        copy.close()
        os.read(reading, 1)
        os._exit(0 if has_nothing else 1)
    try:
        copy.close()  # now nobody uses it, whatever the child still has open
        HostBudget(config, GIB).claim("qwen", 8 * WHOLE_BYTES).close()
        assert not image.exists()
    finally:
        os.close(writing)
        os.close(reading)
        code = os.waitpid(pid, 0)[1]
    assert code == 0
