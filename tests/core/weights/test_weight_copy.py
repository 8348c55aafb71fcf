"""A host copy is filled once, shared by equal weights, and never changed under others."""

import os
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
from helpers.weight_copies import (
    LAYOUT,
    OTHER_KEY,
    WHOLE_BYTES,
    Start,
    check,
    config,
    contents,
    held_bytes,
    image,
    opened,
    start,
)
from helpers.weight_pages import PAGE_BYTES, Pages, Pins

from kvcached_core.config import Config
from kvcached_core.errors import BackendError, HostBudgetError
from kvcached_core.units import GIB
from kvcached_core.weights import host_bytes
from kvcached_core.weights.host_budget import HostBudget
from kvcached_core.weights.host_bytes import HostBytes
from kvcached_core.weights.host_copy import HostCopy, complete

__all__ = ["config", "image", "opened", "start"]


def test_a_first_start_copies_every_page_once_and_shares_them(
    start: Start, config: Config, image: Path
) -> None:
    pages = Pages.of(1)
    assert start(pages).is_shared
    assert pages.copied == [0, 1, 2, 3]
    assert image.read_bytes() == b"".join(pages.content)
    assert image.stat().st_mode & 0o777 == 0o600
    assert held_bytes(config) == WHOLE_BYTES


def test_replicas_share_one_copy(start: Start, config: Config) -> None:
    first, second = start(Pages.of(1)), Pages.of(1)
    assert start(second).is_shared
    assert second.copied == []
    assert held_bytes(config) == WHOLE_BYTES
    first.close()
    start(second)


def test_a_restart_copies_nothing(start: Start) -> None:
    start(Pages.of(1)).close()
    again = Pages.of(1)
    start(again)
    assert again.copied == []


def test_two_models_have_two_copies(start: Start, config: Config) -> None:
    start(Pages.of(1))
    start(Pages.of(2), OTHER_KEY)
    assert held_bytes(config) == 2 * WHOLE_BYTES


def test_a_copy_that_is_being_filled_counts_once(
    opened: Callable[..., HostCopy | None], config: Config
) -> None:
    claim = HostBudget(config, GIB).claim("other", 6 * WHOLE_BYTES)
    assert opened() is not None
    assert opened(OTHER_KEY) is not None
    assert held_bytes(config) == 8 * WHOLE_BYTES
    claim.close()


def test_a_page_that_changes_while_it_is_copied_is_copied_again(start: Start) -> None:
    pages = Pages.of(1)
    copy_out, new = pages.copy_out, bytes(PAGE_BYTES)

    def change_once(page: int, host_address: int) -> None:
        copy_out(page, host_address)
        if page == 2:
            pages.content[2] = new

    pages.copy_out = change_once  # type: ignore[method-assign]
    start(pages)
    assert pages.copied == [0, 1, 2, 2, 3]


def test_a_page_that_never_stands_still_leaves_the_copy_for_later(
    opened: Callable[[], HostCopy | None], image: Path
) -> None:
    copy, pages, moving = opened(), Pages.of(1), Pages.of(1)
    assert copy is not None
    copy_out = moving.copy_out

    def change(page: int, host_address: int) -> None:
        copy_out(page, host_address)
        if page == 2:
            moving.content[2] = len(moving.copied).to_bytes(8) * (PAGE_BYTES // 8)

    moving.copy_out = change  # type: ignore[method-assign]
    assert not complete(copy, Pins(), moving, Event())
    assert not copy.is_complete
    assert not copy.is_shared
    assert not image.with_suffix(".json").exists()
    assert complete(copy, Pins(), pages, Event())
    assert pages.copied == [2, 3]
    check(copy, pages)


def test_a_copy_that_nobody_wants_any_more_is_not_filled_and_not_left(
    opened: Callable[..., HostCopy | None], config: Config, image: Path
) -> None:
    stop, pages = Event(), Pages.of(1)
    copy = opened(stop=stop)
    assert copy is not None
    stop.set()
    assert not complete(copy, Pins(), pages, stop)
    assert pages.copied == []
    copy.close()
    assert not image.exists()
    assert held_bytes(config) == 0
    assert opened(stop=stop) is None
    assert held_bytes(config) == 0


def test_a_stop_while_memory_is_touched_leaves_nothing(
    opened: Callable[..., HostCopy | None], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostBytes, "touch", lambda _self, stop, _cpus: stop.set())
    assert opened(stop=Event()) is None
    assert not image.exists()


# Pages that change on the device.


def test_a_changed_page_is_written_beside_a_shared_file(
    start: Start, config: Config, image: Path
) -> None:
    pages = Pages.of(1)
    before = list(pages.content)
    copy, other = start(pages), start(pages)
    pages.content[1] = pages.content[3] = bytes(PAGE_BYTES)
    assert copy.write_back([1, 3], pages)
    check(copy, pages)
    assert image.read_bytes() == b"".join(before)
    assert contents(other) == before
    assert held_bytes(config) == WHOLE_BYTES + 2 * PAGE_BYTES
    pages.content[1] = b"x" * PAGE_BYTES
    assert copy.write_back([1], pages)
    check(copy, pages)
    assert held_bytes(config) == WHOLE_BYTES + 2 * PAGE_BYTES
    copy.close()
    assert held_bytes(config) == WHOLE_BYTES
    assert start(Pages.of(1)).is_shared


def test_a_copy_of_which_every_page_changed_lets_the_file_go(start: Start, config: Config) -> None:
    pages = Pages.of(1)
    copy = start(pages)
    pages.content[:] = Pages.of(2).content
    assert copy.write_back([0, 1, 2], pages)
    assert copy.is_shared
    assert copy.write_back([3], pages)
    assert not copy.is_shared
    check(copy, pages)
    # The file has no user any more, so a claim that needs its room removes it.
    HostBudget(config).claim("qwen", 7 * WHOLE_BYTES).close()
    assert held_bytes(config) == WHOLE_BYTES
    check(copy, pages)


def test_a_changed_page_for_which_there_is_no_room_is_not_written(
    start: Start, config: Config, image: Path
) -> None:
    pages = Pages.of(1)
    copy = start(pages)
    before = image.read_bytes()
    claim = HostBudget(config).claim("qwen", 7 * WHOLE_BYTES)
    with pytest.raises(HostBudgetError, match="llama needs 64 KiB"):
        copy.write_back([1], Pages.of(2))
    check(copy, pages)
    assert image.read_bytes() == before
    claim.close()
    assert copy.write_back([1], Pages.of(2))


def test_memory_that_is_not_there_for_a_changed_page_claims_nothing(
    start: Start, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = Pages.of(1)
    copy = start(pages)

    def fail(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(HostBytes, "touch", fail)
    with pytest.raises(HostBudgetError, match="changed weights of llama: Cannot allocate"):
        copy.write_back([1], Pages.of(2))
    check(copy, pages)
    assert held_bytes(config) == WHOLE_BYTES


def test_a_page_that_moves_while_it_is_written_back_is_not_believed(start: Start) -> None:
    pages = Pages.of(1)
    copy = start(pages)
    copy_out = pages.copy_out

    def change(page: int, host_address: int) -> None:
        copy_out(page, host_address)
        pages.content[page] = len(pages.copied).to_bytes(8) * (PAGE_BYTES // 8)

    pages.copy_out = change  # type: ignore[method-assign]
    assert not copy.write_back([1], pages)
    assert copy.sums[1] is None
    assert not copy.is_complete
    pages.copy_out = copy_out  # type: ignore[method-assign]
    assert complete(copy, Pins(), pages, Event())
    check(copy, pages)


def test_pages_that_could_not_be_written_back_are_not_believed(start: Start) -> None:
    pages = Pages.of(1)
    copy = start(pages)
    copy_out = pages.copy_out

    def fail(*_: object) -> None:
        raise BackendError("copy_out", "CUDA_ERROR_UNKNOWN", PAGE_BYTES)

    pages.copy_out = fail  # type: ignore[method-assign]
    with pytest.raises(BackendError):
        copy.write_back([1, 3], pages)
    assert copy.sums[1] is None
    assert copy.sums[3] is None
    pages.copy_out = copy_out  # type: ignore[method-assign]
    assert copy.write_back([1, 3], pages)
    check(copy, pages)


# Other weights than those of a file.


def test_a_copy_of_other_weights_is_filled_again(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    start(Pages.of(1)).close()
    caplog.clear()
    other = Pages.of(2)
    assert start(other).is_shared
    assert other.copied == [0, 1, 2, 3]
    assert [line.getMessage() for line in caplog.records] == [
        "kvcached: the host copy of llama is of other weights; filled again"
    ]
    again = Pages.of(2)
    start(again)
    assert again.copied == []


def test_other_weights_than_those_of_a_copy_in_use_get_one_of_their_own(
    start: Start, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    pages = Pages.of(1)
    first = start(pages)
    caplog.clear()
    assert not start(Pages.of(2)).is_shared
    check(first, pages)
    (line,) = caplog.records
    assert "another process uses" in line.getMessage()
    assert held_bytes(config) == 2 * WHOLE_BYTES
    start(Pages.of(1))


def test_other_weights_stay_on_the_device_while_there_is_no_room_for_their_copy(
    start: Start,
    opened: Callable[[], HostCopy | None],
    config: Config,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pages, others = Pages.of(1), Pages.of(2)
    first, second = start(pages), opened()
    assert second is not None
    claim = HostBudget(config).claim("qwen", 7 * WHOLE_BYTES)
    assert not complete(second, Pins(), others, Event())
    assert not second.is_complete
    assert "these weights stay on the device: llama needs 256 KiB" in caplog.text
    check(first, pages)
    claim.close()
    assert complete(second, Pins(), others, Event())
    check(second, others)
    check(first, pages)


# Page-locking.


def test_what_is_pinned_covers_every_page_and_no_page_lies_in_two_ranges(
    start: Start, opened: Callable[[], HostCopy | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_bytes, "MAX_PINNED_BYTES", 3 * PAGE_BYTES + 1)
    pages, pins = Pages.of(1), Pins()
    start(pages).close()
    copy = opened()
    assert copy is not None
    assert complete(copy, pins, pages, Event())
    assert sorted(pins.ranges.values()) == [PAGE_BYTES, 3 * PAGE_BYTES]
    assert copy.pin(pins, Event())
    pages.content[2] = bytes(PAGE_BYTES)
    copy.write_back([2], pages)
    for page in range(LAYOUT.num_pages):
        address = copy.page_address(page)
        assert any(
            first <= address and address + PAGE_BYTES <= first + size
            for first, size in pins.ranges.items()
        )
    copy.close()
    assert pins.ranges == {}


def test_memory_that_cannot_be_pinned_is_used_all_the_same(
    opened: Callable[[], HostCopy | None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(host_bytes, "MAX_PINNED_BYTES", PAGE_BYTES)
    copy, pages, pins = opened(), Pages.of(1), Pins(num_allowed=1)
    assert copy is not None
    assert complete(copy, pins, pages, Event())
    check(copy, pages)
    (line,) = caplog.records
    assert "192 KiB of the host copy of weights cannot be page-locked" in line.getMessage()
    assert "--ulimit memlock=-1" in line.getMessage()
    copy.close()
    assert pins.ranges == {}


def test_memory_is_touched_near_the_device(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []
    usable = os.sched_getaffinity(0)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: seen.append(set(cpus)))
    near = {min(usable)}
    memory = HostBytes(4 * PAGE_BYTES, PAGE_BYTES)
    memory.touch(Event(), near)
    assert seen == [near]
    memory.touch(Event(), {max(usable) + 1})  # of a node that this process may not run on
    assert set(map(frozenset, seen[1:])) == {frozenset(usable)}
    memory.close()
