"""A rank's weights: the same bytes after any give and return, and a ledger that knows it."""

import ctypes
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers.backends import LimitedBackend
from helpers.fake_driver import FakeDriver, Result
from helpers.forked import exit_code_of_child
from helpers.waiting import await_that
from helpers.weight_ranks import NUM_PAGES, PAGE, WeightedRank

from kvcached_core.errors import BackendError, LedgerError
from kvcached_core.ledger.expected import COPY_SECONDS, START_SECONDS
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.memory import patience
from kvcached_core.memory.vmm.backend import Backend
from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import GIB
from kvcached_core.weights import copying, image, rank, rank_row, source
from kvcached_core.weights.copies_folder import read_holders
from kvcached_core.weights.drop_batches import DROP_BATCH_PAGES
from kvcached_core.weights.host_budget import HostBudget
from kvcached_core.weights.mapped_pages import BATCH_PAGES
from kvcached_core.weights.rank_row import PATIENCE_SECONDS
from kvcached_core.weights.sums import Sums

WORDS = PAGE // 8


Make = Callable[..., WeightedRank]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Return what makes a rank; it is closed after the test."""
    made = []

    def make_one(backend: Backend, num_budget_pages: int = 4 * NUM_PAGES) -> WeightedRank:
        made.append(WeightedRank(backend, tmp_path, num_budget_pages))
        return made[-1]

    yield make_one
    for one in made:
        one.close()


def test_weights_are_the_same_after_a_drop_at_every_page(make: Make, backend: Backend) -> None:
    ours = make(backend).start()
    ours.check(NUM_PAGES)
    for num_pages in range(NUM_PAGES + 1):
        status = ours.weights.hold(num_pages)
        assert (status.num_resident_pages, status.num_pages) == (num_pages, NUM_PAGES)
        ours.check(num_pages)
        assert ours.weights.hold(NUM_PAGES).num_missing_pages == 0
        ours.check(NUM_PAGES)


def test_what_maps_and_unmaps_of_weights_take_is_in_the_ledger(
    make: Make, backend: Backend
) -> None:
    ours = make(backend).start()
    assert ours.view().map_times.num_calls == NUM_PAGES  # those of the start
    ours.weights.hold(4)
    ours.weights.hold(7)
    view = ours.view()
    assert view.map_times.num_calls == NUM_PAGES + 3
    assert view.unmap_times.num_calls == NUM_PAGES - 4
    assert view.map_times.nanoseconds == ours.image.arena.maps.times().nanoseconds > 0
    assert view.unmap_times.nanoseconds == ours.image.arena.unmaps.times().nanoseconds > 0


def test_what_torch_keeps_for_later_goes_with_the_last_page_and_stays_for_a_return(
    make: Make, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make(backend).start()
    image, resident = ours.weights.image, []

    def note() -> None:
        resident.append(image.num_resident_pages)
        ours.done.append("release_cached_blocks")

    monkeypatch.setattr(rank, "release_cached_blocks", note)
    for num_pages in (NUM_PAGES, 2, NUM_PAGES, 0):
        ours.weights.hold(num_pages)
    assert resident == [2, 0]
    # Whom the last report wakes finds it.
    assert ours.done[-2:] == ["release_cached_blocks", "settle"]


def test_a_clean_page_is_dropped_and_only_what_is_missing_is_copied_in(
    make: Make, backend: Backend
) -> None:
    ours = make(backend).start()
    ours.weights.hold(12)
    assert "copy_out" not in ours.done
    ours.weights.hold(15)
    assert ours.done.count("copy_in") == 3
    ours.check(15)
    ours.weights.hold(NUM_PAGES + 7)
    assert ours.done.count("copy_in") == NUM_PAGES - 12
    ours.check(NUM_PAGES)


def test_holding_what_is_there_does_nothing(make: Make, backend: Backend) -> None:
    ours = make(backend).start()
    for num_pages in (NUM_PAGES, 100):
        ours.weights.hold(num_pages)
    assert ours.done == []


def test_a_page_that_has_changed_is_written_back_before_it_is_dropped(
    make: Make, backend: Backend
) -> None:
    ours = make(backend).start()
    one, other = 17 * WORDS + 5, 17 * WORDS + 900
    first, second = int(ours.content[one]), int(ours.content[other])
    ours.change(one, second)  # words that are swapped: their sum is the same
    ours.change(other, first)
    ours.change(3 * WORDS, -1)
    ours.weights.hold(10)
    assert ours.done.count("copy_out") == 1
    ours.weights.hold(0)
    assert ours.done.count("copy_out") == 2
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)
    ours.weights.hold(0)
    assert ours.done.count("copy_out") == 2  # it is clean again


def test_without_the_sums_a_change_would_be_lost(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make(HostBackend(PAGE)).start()
    ours.change(17 * WORDS, -1)
    sums = list(ours.copy.sums)
    monkeypatch.setattr(
        source, "begin_page_sums", lambda _, first, count: lambda: sums[first : first + count]
    )
    ours.weights.hold(0)
    ours.weights.hold(NUM_PAGES)
    with pytest.raises(AssertionError):
        ours.check(NUM_PAGES)


def test_a_shared_copy_does_not_change_with_the_weights(make: Make, backend: Backend) -> None:
    ours = make(backend).start()
    assert ours.copy.is_shared
    (image,) = ours.config.copies_dir.glob("*.image")
    before = image.read_bytes()
    assert before == ours.content.numpy().tobytes()
    ours.change(5, 7)
    ours.weights.hold(0)
    assert image.read_bytes() == before
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)


def test_what_was_marked_is_written_back_whatever_its_sums_say(
    make: Make, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make(backend).start()
    ours.change(6 * WORDS, 1)
    ours.weights.mark_dirty()
    sums = list(ours.copy.sums)
    monkeypatch.setattr(
        source, "begin_page_sums", lambda _, first, count: lambda: sums[first : first + count]
    )
    ours.weights.hold(4)
    assert ours.done.count("copy_out") == NUM_PAGES - 4
    ours.weights.hold(NUM_PAGES)
    ours.weights.hold(4)
    assert ours.done.count("copy_out") == NUM_PAGES - 4
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)


def test_pages_that_have_changed_stay_where_the_host_has_no_room_for_them(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    ours = make(HostBackend(PAGE), num_budget_pages=NUM_PAGES).start()
    ours.change(9 * WORDS, 1)
    with caplog.at_level(logging.WARNING, "kvcached"):
        status = ours.weights.hold(0)
    assert "changed weights stay on the device" in caplog.text
    assert status.num_resident_pages == NUM_PAGES - DROP_BATCH_PAGES  # what lay behind them went
    ours.check(status.num_resident_pages)
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)


def test_pages_that_nobody_can_look_at_stay_until_somebody_can(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours = make(HostBackend(PAGE)).start()
    real = source.begin_page_sums

    def full(image: Any, first: int, num_pages: int) -> Callable[[], list[Sums]]:
        if first < NUM_PAGES - DROP_BATCH_PAGES:
            raise torch.OutOfMemoryError
        return real(image, first, num_pages)

    ours.change(9 * WORDS, 1)
    monkeypatch.setattr(source, "begin_page_sums", full)
    assert ours.weights.hold(0).num_missing_pages == 0
    assert "weights stay, nobody can see if they changed" in caplog.text
    ours.check(NUM_PAGES)
    monkeypatch.setattr(source, "begin_page_sums", real)
    assert ours.weights.hold(0).num_resident_pages == 0
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)


def test_pages_that_change_while_nothing_runs_stay(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours = make(HostBackend(PAGE)).start()
    real = source.begin_page_sums

    def restless(image: Any, first: int, num_pages: int) -> Callable[[], list[Sums]]:
        if first == 17 and num_pages == 1:
            ours.change(17 * WORDS, int(ours.content[17 * WORDS]) + 1)
        return real(image, first, num_pages)

    ours.change(17 * WORDS, 0)
    monkeypatch.setattr(source, "begin_page_sums", restless)
    assert ours.weights.hold(0).num_missing_pages == 0
    assert "weights change though nothing runs" in caplog.text
    monkeypatch.setattr(source, "begin_page_sums", real)
    assert ours.weights.hold(0).num_resident_pages == 0
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)


def test_nothing_is_dropped_before_the_host_has_it(make: Make, backend: Backend) -> None:
    ours = make(backend)
    ours.weights.join(ours.seat)
    assert not ours.weights.status().is_copied
    assert ours.weights.hold(0).num_missing_pages == 0
    ours.check(NUM_PAGES)


def test_the_first_pages_are_reported_before_the_next_ones_go(make: Make, backend: Backend) -> None:
    ours = make(backend).start()
    ours.weights.hold(1)
    steps = [verb for verb in ours.done if verb in ("unmap", "settle")]
    sizes = [len(batch.split()) for batch in " ".join(steps).split("settle")]
    rest_pages = NUM_PAGES - 1 - DROP_BATCH_PAGES
    assert DROP_BATCH_PAGES < rest_pages <= 2 * DROP_BATCH_PAGES  # each batch is twice the last one
    assert sizes == [DROP_BATCH_PAGES, rest_pages, 0]


def test_the_device_looks_at_the_next_pages_while_the_last_ones_go(
    make: Make, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make(backend).start()
    real = source.begin_page_sums

    def begin(image: Any, first: int, num_pages: int) -> Callable[[], list[Sums]]:
        ours.done.append("begin")
        read = real(image, first, num_pages)

        def wait() -> list[Sums]:
            ours.done.append("wait")
            return read()

        return wait

    monkeypatch.setattr(source, "begin_page_sums", begin)
    ours.weights.hold(1)
    steps = [verb for verb in ours.done if verb in ("begin", "wait", "unmap")]
    rest_pages = NUM_PAGES - 1 - DROP_BATCH_PAGES
    drop = ["unmap"]
    assert steps == [
        *("begin", "wait"),
        *("begin", *(drop * DROP_BATCH_PAGES), "wait"),
        *(drop * rest_pages),
    ]


def test_pages_go_when_the_device_is_done_and_not_before(make: Make, backend: Backend) -> None:
    ours = make(backend).start()
    ours.weights.hold(3)
    assert ours.done.index("fence") < ours.done.index("unmap")
    assert ours.done.index("finish_copies") < ours.done.index("unmap")


def test_a_page_is_copied_as_soon_as_it_is_mapped_and_a_step_waits_for_the_last(
    make: Make, backend: Backend
) -> None:
    ours = make(backend).start()
    ours.weights.hold(NUM_PAGES - 6)
    ours.done.clear()
    ours.weights.hold(NUM_PAGES)
    page = ["create", "map", "copy_in"]
    assert ours.done == [
        *(page * BATCH_PAGES),
        "settle",
        *(page * (6 - BATCH_PAGES)),
        "settle",
        "join_copies",
    ]


def test_a_page_comes_in_parts_that_others_copies_get_in_between(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "MAX_COPY_BYTES", PAGE // 4 * 3)
    ours = make(HostBackend(PAGE)).start()
    ours.weights.hold(0)
    ours.done.clear()
    ours.weights.hold(NUM_PAGES)
    assert ours.done.count("copy_in") == 2 * NUM_PAGES
    ours.check(NUM_PAGES)


CALLS = [
    ("cuMemCreate", Result.CUDA_ERROR_UNKNOWN),
    ("cuMemMap", Result.CUDA_ERROR_INVALID_VALUE),
    ("cuMemSetAccess", Result.CUDA_ERROR_UNKNOWN),
    ("cuMemcpyHtoDAsync", Result.CUDA_ERROR_LAUNCH_FAILED),
    ("cuMemcpyDtoHAsync", Result.CUDA_ERROR_LAUNCH_FAILED),
    ("cuEventCreate", Result.CUDA_ERROR_UNKNOWN),
    ("cuEventRecord", Result.CUDA_ERROR_UNKNOWN),
    ("cuStreamWaitEvent", Result.CUDA_ERROR_UNKNOWN),
    ("cuEventSynchronize", Result.CUDA_ERROR_UNKNOWN),
    ("cuMemUnmap", Result.CUDA_ERROR_UNKNOWN),
    ("cuMemRelease", Result.CUDA_ERROR_UNKNOWN),
]


@pytest.mark.parametrize("number", [0, 1, 5])
@pytest.mark.parametrize(("name", "code"), CALLS)
def test_a_failure_at_any_call_leaves_the_first_pages_and_a_ledger_that_knows_it(
    make: Make, driver: FakeDriver, name: str, code: Any, number: int
) -> None:
    ours = make(CudaBackend(api=cast("Any", driver))).start()
    ours.weights.hold(13)
    ours.change(2 * WORDS, 3)
    first = driver.calls[name]
    driver.fails = lambda called, count: code if (called, count) == (name, first + number) else None
    for num_pages in (NUM_PAGES, 1, NUM_PAGES):
        try:
            ours.weights.hold(num_pages)
        except BackendError as error:
            assert error.call == name  # noqa: PT017  not every call is made in each of them
        status = ours.weights.status()
        assert sorted(ours.image.arena.resident_pages) == list(range(ours.image.num_resident_pages))
        assert status.num_resident_pages <= ours.image.num_resident_pages
        assert ours.view().weights_bytes == ours.image.num_resident_pages * PAGE
        assert driver.mapped_bytes == ours.view().weights_bytes
    driver.fails = lambda _name, _number: None
    ours.weights.hold(4)
    ours.check(4)
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)


def test_a_page_that_could_not_be_dropped_is_not_taken_for_weights(
    make: Make, driver: FakeDriver
) -> None:
    ours = make(CudaBackend(api=cast("Any", driver))).start()
    ours.weights.hold(5)
    failing = {"cuMemcpyHtoDAsync", "cuMemUnmap"}
    driver.fails = lambda name, _: Result.CUDA_ERROR_UNKNOWN if name in failing else None
    with pytest.raises(BackendError, match="cuMemcpyHtoDAsync"):
        ours.weights.hold(NUM_PAGES)
    assert ours.image.num_resident_pages == 6  # its bytes are garbage
    assert ours.weights.status().num_resident_pages == 5
    assert ours.view().weights_bytes == 6 * PAGE
    driver.fails = lambda _name, _number: None
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept; time runs meanwhile, and at no other time."""
    sleeps: list[float] = []
    fake = SimpleNamespace(monotonic=lambda: sum(sleeps), sleep=sleeps.append)
    monkeypatch.setattr(patience, "time", fake)
    return sleeps


def test_a_wake_that_finds_no_memory_asks_its_neighbours_and_goes_on_when_it_comes(
    make: Make, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = LimitedBackend(HostBackend(PAGE), NUM_PAGES * PAGE)
    ours = make(limited).start()
    ours.weights.hold(4)
    limited.limit_bytes = 10 * PAGE
    asked = []

    def ask(_ledger: Ledger, row: object, num_bytes: int, *, is_static: bool) -> None:
        asked.append((row, num_bytes, is_static))
        assert ours.view().weights_bytes == 10 * PAGE  # what is there, everybody knows
        if len(asked) == 3:
            limited.limit_bytes = NUM_PAGES * PAGE

    monkeypatch.setattr(rank_row, "ask_peers", ask)
    assert ours.weights.hold(NUM_PAGES).num_missing_pages == 0
    assert asked == [(ours.row, (NUM_PAGES - 10) * PAGE, True)] * 3
    assert clock == sorted(clock)
    ours.check(NUM_PAGES)


def test_a_wake_that_finds_no_memory_keeps_what_came_and_ends(
    make: Make, driver: FakeDriver, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    ours = make(CudaBackend(api=cast("Any", driver))).start()
    ours.weights.hold(4)
    driver.capacity_bytes = 10 * PAGE
    neighbour = ours.ledger.register(name="neighbour", engine="test")
    ours.ledger.settle(neighbour, mapped_bytes=50 * PAGE, used_bytes=0, cached_bytes=0)
    ours.ledger.announce(ours.row, GIB, is_waking=True)
    assert ours.weights.hold(NUM_PAGES).num_resident_pages == 10
    assert "requests wait for the rest of the weights" in caplog.text
    assert ours.ledger.wanted(neighbour).asked_bytes == 9 * PAGE
    assert PATIENCE_SECONDS < sum(clock) < PATIENCE_SECONDS + 1
    ours.check(10)
    assert ours.view().waiting_bytes == 0
    driver.capacity_bytes = NUM_PAGES * PAGE
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)


def test_a_rank_that_is_in_no_ledger_gives_and_takes_too(make: Make) -> None:
    ours = make(HostBackend(PAGE))
    ours.weights.begin_copy()
    await_that(lambda: ours.weights.status().is_copied)
    ours.weights.hold(0)
    ours.weights.hold(NUM_PAGES)
    assert ours.words().equal(ours.content)
    assert ours.view().weights_bytes == 0


def test_who_joins_later_reports_what_is_there_then(make: Make) -> None:
    ours = make(HostBackend(PAGE))
    ours.weights.begin_copy()
    await_that(lambda: ours.weights.status().is_copied)
    ours.weights.hold(7)
    ours.weights.join(ours.seat)
    ours.check(7)


def test_a_copy_that_another_start_left_is_used_as_it_is(make: Make, tmp_path: Path) -> None:
    make(HostBackend(PAGE)).start().close()
    ours = WeightedRank(HostBackend(PAGE), tmp_path)
    ours.weights.join(ours.seat)
    ours.weights.begin_copy()
    await_that(lambda: ours.weights.status().is_copied)
    assert "copy_out" not in ours.done
    ours.weights.hold(0)
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)
    ours.close()


def test_weights_stay_where_making_their_copy_breaks(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    ours = make(HostBackend(PAGE))

    def make_copy(_stop: Event) -> None:
        raise RuntimeError("the device is gone")

    ours.weights.copying._make_copy = make_copy
    ours.weights.begin_copy()
    ours.weights.copying.join()
    assert not ours.weights.status().is_copied
    assert ours.weights.hold(0).num_missing_pages == 0
    assert "the weights could not be copied, so they stay" in caplog.text


def test_who_starts_is_told_that_a_copy_gets_further_and_when_it_fails(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    monkeypatch.setattr(Ledger, "expect_weights", lambda _self, _row, seconds: told.append(seconds))
    monkeypatch.setattr(copying, "NEWS_SECONDS", 0.0)
    ours = make(HostBackend(PAGE)).start()
    assert told == [START_SECONDS, COPY_SECONDS, *[COPY_SECONDS] * NUM_PAGES]
    ours.change(0, 5)
    ours.weights.hold(0)  # a page is copied again, and all were offered
    assert len(told) == 2 + NUM_PAGES

    ours.close()
    ours, told[:] = make(HostBackend(PAGE)), []
    ours.weights.join(ours.seat)
    ours.weights.copying._make_copy = lambda _stop: 1 / 0
    ours.weights.begin_copy()
    ours.weights.copying.join()
    assert told == [START_SECONDS, COPY_SECONDS, 0]

    ours.close()
    ours, told[:] = make(HostBackend(PAGE)), []
    monkeypatch.setattr(copying, "FIRST_RETRY_SECONDS", 0.001)
    outcomes = [None, ours.open_copy(Event())]
    ours.weights.copying._make_copy = lambda _stop: outcomes.pop(0)
    ours.weights.join(ours.seat)
    ours.weights.begin_copy()
    await_that(lambda: ours.weights.status().is_copied)
    assert told[:4] == [START_SECONDS, COPY_SECONDS, 0, COPY_SECONDS]


def test_what_could_not_be_copied_is_tried_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make(HostBackend(PAGE))
    tried = []
    real = copying.complete

    def complete_at_the_third_try(*args: Any) -> bool:
        tried.append(threading.current_thread().name)
        return len(tried) == 3 and real(*args)

    monkeypatch.setattr(copying, "complete", complete_at_the_third_try)
    monkeypatch.setattr(copying, "FIRST_RETRY_SECONDS", 0.001)
    ours.weights.begin_copy()
    ours.weights.begin_copy()  # one thread is enough
    await_that(lambda: ours.weights.status().is_copied)
    assert tried == ["kvcached-weights"] * 3


def test_a_copy_begins_when_others_left_room_for_all_of_it(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours = make(HostBackend(PAGE), NUM_PAGES + 5)
    other = HostBudget(ours.config, GIB).claim("other", 6 * PAGE)
    monkeypatch.setattr(copying, "FIRST_RETRY_SECONDS", 0.001)
    ours.weights.begin_copy()
    await_that(lambda: caplog.text.count("stay on the device") > 1)
    assert not ours.weights.status().is_copied
    assert ours.weights.hold(0).num_missing_pages == 0
    folder = ours.config.copies_dir  # each try has an empty file there for a moment
    await_that(lambda: [one.name for one in read_holders(folder)] == ["other"])
    other.close()
    await_that(lambda: ours.weights.status().is_copied)


def test_who_closes_does_not_wait_for_a_copy(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = make(HostBackend(PAGE))
    is_trying = Event()

    def never_complete(*_args: Any) -> bool:
        is_trying.set()
        return False

    monkeypatch.setattr(copying, "complete", never_complete)
    ours.weights.begin_copy()
    assert is_trying.wait(30)
    ours.close()  # it would be tried again in five seconds, and for ever
    assert not ours.weights.status().is_copied


def test_close_gives_everything_back_and_says_so(make: Make, driver: FakeDriver) -> None:
    ours = make(CudaBackend(api=cast("Any", driver))).start()
    ours.weights.hold(11)
    assert driver.registered
    ours.weights.close()
    ours.weights.close()
    assert (driver.created_bytes, driver.mapped_bytes) == (0, 0)
    assert not driver.registered
    assert ours.view().weights_bytes == 0
    assert ours.weights.status().num_resident_pages == 0


def test_an_instance_that_has_left_is_not_reported_to(make: Make) -> None:
    ours = make(HostBackend(PAGE)).start()
    ours.ledger.unregister(ours.row)
    with pytest.raises(LedgerError):
        ours.weights.hold(3)
    ours.weights.close()
    assert ours.image.num_resident_pages == 0


def test_a_forked_child_owns_no_weights(make: Make) -> None:
    ours = make(HostBackend(PAGE)).start()

    def close_and_read() -> None:
        ours.weights.close()
        ctypes.string_at(ours.image.page_address(NUM_PAGES - 1), PAGE)

    assert exit_code_of_child(close_and_read) == 0
    ours.check(NUM_PAGES)
    ours.weights.hold(0)
    ours.weights.hold(NUM_PAGES)
    ours.check(NUM_PAGES)


def test_sums_and_copies_are_of_the_same_pages(make: Make) -> None:
    ours = make(HostBackend(PAGE)).start()
    assert ours.copy.sums == source.begin_page_sums(ours.image, 0, NUM_PAGES)()
    for page in range(NUM_PAGES):
        there = ours.words()[page * WORDS : (page + 1) * WORDS]
        address = ours.copy.page_address(page)
        copied = HostBackend(PAGE).tensor(address, PAGE).view(torch.int64)
        assert there.equal(copied)
