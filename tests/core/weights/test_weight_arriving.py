"""Weights on their way: each part of a forward finds its own pages, and waits for no others."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from helpers.backends import LimitedBackend
from helpers.fake_driver import FakeDriver, Result
from helpers.weight_ranks import NUM_PAGES, PAGE, WeightedRank
from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.errors import BackendError, LayerOrderError
from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.units import GIB
from kvcached_core.weights import arriving
from kvcached_core.weights.arriving import AHEAD_BYTES, Arriving
from kvcached_core.weights.exporting import Wish
from kvcached_core.weights.mapped_pages import BATCH_PAGES
from kvcached_core.weights.stages import Points, Stages
from kvcached_core.weights.walks import Walks

POINTS = Points(2, (9, NUM_PAGES))
COPIES = 2  # the number of the second stream that the backend has made


@pytest.fixture
def ours(driver: FakeDriver, tmp_path: Path) -> Iterator[WeightedRank]:
    """A rank on a GPU whose weights are copied, page-locked, and let arrive."""
    made = WeightedRank(CudaBackend(api=cast("Any", driver)), tmp_path)
    made.start()
    made.weights.lets_arrive = True
    yield made
    made.close()


def coming(ours: WeightedRank, driver: FakeDriver) -> list[int]:
    """Return the pages whose copies have begun and are not done."""
    address = ours.image.page_address
    return [page for page in range(NUM_PAGES) if driver.is_copied_under_way(address(page), PAGE)]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let the device be told of so many pages ahead of what it has copied."""
    num_pages = 3
    monkeypatch.setattr(arriving, "AHEAD_BYTES", num_pages * PAGE)
    return num_pages


def test_a_hold_returns_while_pages_come_and_who_waits_has_those_in_front(
    ours: WeightedRank, driver: FakeDriver
) -> None:
    ours.weights.hold(0)
    assert ours.weights.hold(NUM_PAGES).num_missing_pages == 0
    arriving = ours.weights.arriving
    assert coming(ours, driver) == list(range(NUM_PAGES))
    for num_pages in (1, 4, 5, 10, NUM_PAGES - 1):
        arriving.wait(num_pages)
        assert coming(ours, driver) == list(range(num_pages, NUM_PAGES))
    assert arriving.is_pending
    arriving.finish()
    assert not arriving.is_pending
    ours.check(NUM_PAGES)
    assert not driver._events


def test_who_has_waited_once_waits_no_more_and_every_stream_waits_for_itself(
    ours: WeightedRank, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    arriving, stream = ours.weights.arriving, [1]
    monkeypatch.setattr(arriving, "_current_stream", lambda: stream[0])
    ours.weights.hold(0)
    ours.weights.hold(NUM_PAGES)
    waits = driver.calls["cuStreamWaitEvent"]
    for number, num_new in ((1, 1), (1, 0), (2, 1), (2, 0), (1, 0)):
        stream[0] = number
        arriving.wait(5)
        waits += num_new
        assert driver.calls["cuStreamWaitEvent"] == waits
    arriving.finish()


def test_pages_that_had_stayed_are_waited_for_by_nobody(
    ours: WeightedRank, driver: FakeDriver
) -> None:
    ours.weights.hold(10)
    ours.weights.hold(NUM_PAGES)
    ours.weights.arriving.wait(10)
    assert coming(ours, driver) == list(range(10, NUM_PAGES))
    ours.weights.arriving.wait(11)
    assert coming(ours, driver) == list(range(11, NUM_PAGES))
    ours.weights.arriving.finish()
    ours.check(NUM_PAGES)


def test_weights_that_arrive_may_be_given_again_before_anybody_has_waited(
    ours: WeightedRank, driver: FakeDriver
) -> None:
    ours.weights.hold(0)
    ours.weights.hold(NUM_PAGES)
    ours.weights.arriving.wait(5)
    ours.weights.hold(7)
    assert not ours.weights.arriving.is_pending
    ours.check(7)
    ours.weights.hold(NUM_PAGES)
    ours.weights.arriving.finish()
    ours.check(NUM_PAGES)
    assert not driver._events


def test_no_copy_begins_before_the_last_page_is_mapped_and_neighbours_hear_of_maps_meanwhile(
    ours: WeightedRank,
) -> None:
    ours.weights.hold(NUM_PAGES - 6)
    ours.done.clear()
    ours.weights.hold(NUM_PAGES)
    page = ["create", "map"]
    assert ours.done == [
        *(page * BATCH_PAGES),
        "settle",
        *(page * (6 - BATCH_PAGES)),
        "settle",
        *(["copy_in", "mark_copies"] * 6),
    ]
    ours.weights.arriving.finish()
    ours.check(NUM_PAGES)


def test_pages_that_are_mapped_and_have_not_begun_count_as_resident_and_not_as_there(
    ours: WeightedRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    map_next, seen = ours.image.map_next, list[tuple[int, int]]()

    def map_and_look(num_pages: int) -> None:
        map_next(num_pages)
        seen.append((ours.view().weights_bytes, ours.weights.status().num_resident_pages))

    ours.weights.hold(0)
    monkeypatch.setattr(ours.image, "map_next", map_and_look)
    ours.weights.hold(NUM_PAGES)
    reported = [page // BATCH_PAGES * BATCH_PAGES * PAGE for page in range(NUM_PAGES)]
    assert seen == [(num_bytes, 0) for num_bytes in reported]
    ours.weights.arriving.finish()
    ours.check(NUM_PAGES)


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_a_map_that_fails_leaves_the_pages_in_front_of_it_which_come(
    ours: WeightedRank, driver: FakeDriver, call: str
) -> None:
    ours.weights.hold(0)
    number = driver.calls[call] + 7
    driver.fails = lambda *called: Result.CUDA_ERROR_UNKNOWN if called == (call, number) else None
    with pytest.raises(BackendError, match=call):
        ours.weights.hold(NUM_PAGES)
    assert not ours.weights.arriving.is_pending
    assert coming(ours, driver) == []
    ours.check(7)
    ours.weights.hold(NUM_PAGES)
    ours.weights.arriving.finish()
    ours.check(NUM_PAGES)


def test_a_copy_that_fails_behind_the_maps_leaves_the_pages_in_front_of_it(
    ours: WeightedRank, driver: FakeDriver
) -> None:
    call = "cuMemcpyHtoDAsync"
    ours.weights.hold(0)
    number = driver.calls[call] + 7
    driver.fails = lambda *called: Result.CUDA_ERROR_UNKNOWN if called == (call, number) else None
    with pytest.raises(BackendError, match=call):
        ours.weights.hold(NUM_PAGES)
    assert not ours.weights.arriving.is_pending
    assert ours.weights.status().num_resident_pages == 7
    assert ours.view().weights_bytes == NUM_PAGES * PAGE  # mapped they are
    ours.weights.hold(7)
    ours.check(7)


def test_where_memory_ends_what_came_is_waited_for_as_ever_and_the_rest_arrives(
    driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcached_core.weights.rank_row.PATIENCE_SECONDS", 0)
    backend = LimitedBackend(CudaBackend(api=cast("Any", driver)), GIB)
    ours = WeightedRank(backend, tmp_path).start()
    ours.weights.lets_arrive = True
    ours.weights.hold(0)
    backend.limit_bytes = 6 * PAGE
    assert ours.weights.hold(NUM_PAGES).num_resident_pages == 6
    assert coming(ours, driver) == []
    ours.check(6)
    backend.limit_bytes = GIB
    ours.weights.hold(NUM_PAGES)
    assert coming(ours, driver) == list(range(6, NUM_PAGES))
    ours.weights.arriving.finish()
    ours.check(NUM_PAGES)
    ours.close()


@pytest.mark.parametrize("call", ["cuEventCreate", "cuEventRecord"])
def test_pages_that_cannot_be_marked_are_waited_for_by_the_host(
    ours: WeightedRank, driver: FakeDriver, call: str
) -> None:
    ours.weights.hold(0)
    number = driver.calls[call] + 2
    driver.fails = lambda *called: Result.CUDA_ERROR_UNKNOWN if called == (call, number) else None
    assert ours.weights.hold(NUM_PAGES).num_missing_pages == 0
    assert coming(ours, driver) == list(range(3, NUM_PAGES))
    for num_pages in (2, 3, 4, NUM_PAGES):
        ours.weights.arriving.wait(num_pages)
        assert coming(ours, driver) == list(range(max(num_pages, 3), NUM_PAGES))
    ours.weights.arriving.finish()
    ours.check(NUM_PAGES)
    assert not driver._events


def test_a_wait_that_the_driver_refuses_is_one_of_the_host(
    ours: WeightedRank, driver: FakeDriver
) -> None:
    ours.weights.hold(0)
    ours.weights.hold(NUM_PAGES)
    driver.fails = lambda name, _number: (
        Result.CUDA_ERROR_UNKNOWN if name == "cuStreamWaitEvent" else None
    )
    ours.weights.arriving.wait(1)
    assert coming(ours, driver) == []
    driver.fails = lambda name, _number: (
        Result.CUDA_ERROR_UNKNOWN if name in ("cuStreamWaitEvent", "cuEventSynchronize") else None
    )
    with pytest.raises(BackendError, match="cuEventSynchronize"):
        ours.weights.arriving.finish()
    driver.fails = lambda _name, _number: None


# A few at a time


def test_the_device_is_told_of_a_few_pages_ahead_of_what_it_has_copied(
    ours: WeightedRank, driver: FakeDriver, ahead: int
) -> None:
    arriving, largest = ours.weights.arriving, 0
    begin = ours.image.copy_from

    def note(host_address_of: Any, page: int) -> None:
        nonlocal largest
        begin(host_address_of, page)
        largest = max(largest, len(coming(ours, driver)))

    ours.image.copy_from = note  # type: ignore[method-assign]
    ours.weights.hold(0)
    assert ours.weights.hold(NUM_PAGES).num_missing_pages == 0
    assert coming(ours, driver) == list(range(ahead))
    assert arriving.num_unbegun == NUM_PAGES - ahead
    for num_pages in range(1, NUM_PAGES + 1):
        arriving.wait(num_pages)
        found = coming(ours, driver)
        assert found == list(range(num_pages, num_pages + len(found)))  # in order, none left out
    assert largest == ahead
    assert arriving.num_unbegun == 0
    arriving.finish()
    ours.check(NUM_PAGES)
    assert not driver._events


def test_the_device_is_told_of_more_as_far_as_copies_are_done(
    ours: WeightedRank, driver: FakeDriver, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, num_done = ours.image.copy_from, 6

    def begin_while_copies_go_on(host_address_of: Any, page: int) -> None:
        begin(host_address_of, page)
        if page < num_done:
            driver._carry_out(COPIES, driver._num_copied[COPIES] + 1)

    ours.weights.hold(0)
    monkeypatch.setattr(ours.image, "copy_from", begin_while_copies_go_on)
    ours.weights.hold(NUM_PAGES)
    assert coming(ours, driver) == list(range(num_done, num_done + ahead))
    ours.weights.arriving.finish()
    ours.check(NUM_PAGES)


def test_who_needs_more_than_a_few_has_all_of_it_begun(
    ours: WeightedRank, driver: FakeDriver, ahead: int
) -> None:
    walks = Walks(ours.weights.arriving, POINTS)
    assert walked(walks, (0, 1))
    asleep_and_back(ours)
    with walks.step(is_whole=True) as walk:
        assert walk is not None
        walk.begin()
        assert coming(ours, driver) == list(range(2, 2 + ahead))
        walk.pass_point(0)
        assert coming(ours, driver) == list(range(9, 9 + ahead))
        walk.pass_point(1)
    asleep_and_back(ours)
    with walks.step(is_whole=False):
        assert ours.weights.arriving.num_unbegun == 0
    ours.check(NUM_PAGES)


@pytest.mark.usefixtures("ahead")
def test_a_copy_that_was_not_read_to_its_end_is_not_offered(
    ours: WeightedRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: list[int] = []
    arriving, moving = ours.weights.arriving, ours.weights._moving_out
    monkeypatch.setattr(moving, "offer", lambda: offered.append(arriving.num_unbegun))
    arriving.on_finished = moving.offer
    ours.weights.hold(0)
    assert offered == [0]
    ours.weights.hold(NUM_PAGES)
    arriving.wait(5)
    assert offered == [0]
    arriving.finish()
    assert offered == [0, 0]


def test_a_replica_is_given_no_page_that_has_not_begun(ours: WeightedRank, ahead: int) -> None:
    wish = Wish(ours.copy.digest, PAGE, 0, ours.copy.known_sums(0, NUM_PAGES))
    assert len(ours.weights._find_pages(wish)) == NUM_PAGES
    ours.weights.hold(0)
    ours.weights.hold(NUM_PAGES)
    assert len(ours.weights._find_pages(wish)) == ahead
    ours.weights.arriving.finish()
    assert len(ours.weights._find_pages(wish)) == NUM_PAGES


def test_who_closes_copies_nothing_more(ours: WeightedRank, driver: FakeDriver, ahead: int) -> None:
    ours.weights.hold(0)
    copied = driver.calls["cuMemcpyHtoDAsync"]
    ours.weights.hold(NUM_PAGES)
    ours.weights.close()
    assert driver.calls["cuMemcpyHtoDAsync"] == copied + ahead
    assert not driver._events


@pytest.mark.parametrize("number", [0, 1, 2, 5, 11])
@pytest.mark.parametrize(
    "call",
    [
        "cuMemCreate",
        "cuMemMap",
        "cuMemcpyHtoDAsync",
        "cuEventCreate",
        "cuEventRecord",
        "cuEventQuery",
        "cuEventSynchronize",
        "cuStreamWaitEvent",
        "cuMemUnmap",
    ],
)
@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("is_for_good", [False, True])
def test_a_failure_at_any_call_leaves_the_first_pages_and_nothing_counts_that_was_not_copied(
    ours: WeightedRank, driver: FakeDriver, call: str, number: int, *, is_for_good: bool
) -> None:
    ours.weights.hold(0)
    first = driver.calls[call] + number

    def fails(name: str, count: int) -> Any:
        is_due = name == call and (count >= first if is_for_good else count == first)
        return Result.CUDA_ERROR_UNKNOWN if is_due else None

    driver.fails = fails
    for num_pages in (NUM_PAGES, 7, NUM_PAGES):
        with suppress(BackendError):
            ours.weights.hold(num_pages)
        for needed in (2, 9, NUM_PAGES):
            with suppress(BackendError):
                ours.weights.arriving.wait(needed)
        with suppress(BackendError):
            ours.weights.arriving.finish()
        status = ours.weights.status()
        assert status.num_resident_pages <= ours.image.num_resident_pages
        assert driver.mapped_bytes == ours.image.num_resident_pages * PAGE
        if not is_for_good and not ours.weights.arriving.is_pending:
            driver._carry_out(COPIES)
            num_there = status.num_resident_pages
            assert ours.words(num_there).equal(ours.content[: num_there * PAGE // 8])
    driver.fails = lambda _name, _number: None
    ours.weights.hold(4)
    ours.weights.arriving.finish()
    ours.check(4)
    ours.weights.hold(NUM_PAGES)
    ours.weights.arriving.finish()
    ours.check(NUM_PAGES)
    assert not driver._events or call == "cuEventSynchronize"


# Walks


def walked(walks: Walks, passed: tuple[int, ...], *, is_whole: bool = True) -> bool:
    """Run a step that passes some points; return whether it had a walk."""
    with walks.step(is_whole=is_whole) as walk:
        if walk is not None:
            walk.begin()
            for point in passed:
                walk.pass_point(point)
    return walk is not None


def asleep_and_back(ours: WeightedRank) -> None:
    ours.weights.hold(0)
    ours.weights.hold(NUM_PAGES)


def test_a_forward_is_watched_once_and_then_begins_while_weights_come(
    ours: WeightedRank, driver: FakeDriver
) -> None:
    walks = Walks(ours.weights.arriving, POINTS)
    asleep_and_back(ours)
    with walks.step(is_whole=True) as walk:
        assert coming(ours, driver) == []  # it is not trusted yet
        assert walk is not None
        walk.begin()
        walk.pass_point(0)
        walk.pass_point(1)
    assert not walks.is_due
    asleep_and_back(ours)
    assert walks.is_due
    with walks.step(is_whole=True) as walk:
        assert walk is not None
        assert coming(ours, driver) == list(range(NUM_PAGES))  # what prepares it waits for none
        walk.begin()
        assert coming(ours, driver) == list(range(2, NUM_PAGES))
        for _ in range(2):
            walk.pass_point(0)
            assert coming(ours, driver) == list(range(9, NUM_PAGES))
        walk.pass_point(1)
        assert coming(ours, driver) == []
    assert not walks.is_due
    ours.check(NUM_PAGES)


def test_a_step_that_passes_no_points_waits_for_all_and_is_nothing_to_learn_from(
    ours: WeightedRank, driver: FakeDriver
) -> None:
    walks = Walks(ours.weights.arriving, POINTS)
    assert walked(walks, (0, 1))
    asleep_and_back(ours)
    with walks.step(is_whole=False) as walk:
        assert walk is None
        assert coming(ours, driver) == []
    asleep_and_back(ours)
    assert walked(walks, (0, 1))


def test_a_forward_that_reaches_a_point_before_its_beginning_is_never_let_begin(
    ours: WeightedRank, driver: FakeDriver
) -> None:
    walks = Walks(ours.weights.arriving, POINTS)
    with walks.step(is_whole=True) as walk:
        assert walk is not None
        walk.pass_point(0)
        walk.begin()
        walk.pass_point(1)
    asleep_and_back(ours)
    with walks.step(is_whole=True) as walk:
        assert walk is None
        assert coming(ours, driver) == []


@pytest.mark.parametrize("passed", [(), (0,), (1, 0), (1,)])
def test_a_forward_of_another_order_is_never_let_begin(
    ours: WeightedRank, driver: FakeDriver, passed: tuple[int, ...]
) -> None:
    walks = Walks(ours.weights.arriving, POINTS)
    assert walked(walks, passed)
    assert not walks.is_due
    asleep_and_back(ours)
    with walks.step(is_whole=True) as walk:
        assert walk is None
        assert coming(ours, driver) == []


def test_an_answer_of_a_forward_that_changed_its_order_is_thrown_away(
    ours: WeightedRank, driver: FakeDriver
) -> None:
    walks = Walks(ours.weights.arriving, POINTS)
    assert walked(walks, (0, 1))
    asleep_and_back(ours)
    with pytest.raises(LayerOrderError, match="unset KVCACHED_WEIGHTS_WAIT"):
        walked(walks, (0,))
    assert coming(ours, driver) == []
    asleep_and_back(ours)
    assert not walked(walks, (0, 1))


def test_a_forward_that_fails_leaves_weights_that_are_there(
    ours: WeightedRank, driver: FakeDriver
) -> None:
    walks = Walks(ours.weights.arriving, POINTS)
    assert walked(walks, (0, 1))
    asleep_and_back(ours)
    with pytest.raises(KeyError), walks.step(is_whole=True):
        raise KeyError
    assert coming(ours, driver) == []
    ours.check(NUM_PAGES)
    asleep_and_back(ours)
    assert walked(walks, (0, 1))


# What a forward needs


class Copies:
    """A backend that knows how many pages a stream has waited for."""

    def __init__(self) -> None:
        self.num_begun = self.num_there = 0

    def begin(self, page: int) -> None:
        self.num_begun = page + 1

    def mark_copies(self) -> "Waits":
        return Waits(self, self.num_begun)


class Waits:
    """A mark behind so many pages."""

    def __init__(self, copies: Copies, num_pages: int) -> None:
        self.copies, self.num_pages = copies, num_pages

    def join(self, _stream: int) -> None:
        self.copies.num_there = max(self.copies.num_there, self.num_pages)

    def is_done(self) -> bool:
        return self.num_pages <= self.copies.num_there

    def close(self) -> None:
        pass


@st.composite
def stages(draw: st.DrawFn) -> Stages:
    """Return those of a model whose layers lie one behind the other; some may have nothing."""
    num_outside = draw(st.integers(0, 5))
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
    reached = list(accumulate(sizes, initial=num_outside))
    ends = tuple(end if size else 0 for size, end in zip(sizes, reached[1:], strict=True))
    return Stages(max(reached[-1], 1), num_outside, ends)


def run(
    model: Stages, points: Points, parts: list[tuple[int, ...]], stayed: int, num_ahead: int
) -> list[int]:
    """Run a forward that reads some layers between two points; return what was there for each."""
    copies = Copies()
    copies.num_there = stayed = min(stayed, model.num_pages)
    arriving = Arriving(cast("Any", copies), lambda: 0, AHEAD_BYTES // num_ahead)
    for page in range(stayed, model.num_pages):
        arriving.expect(page, copies.begin)
    walks = Walks(arriving, points)
    walks._is_trusted = True
    there = []
    with walks.step(is_whole=True) as walk:
        assert walk is not None
        walk.begin()
        for number, layers in enumerate(parts):
            if number:
                walk.pass_point(number - 1)
            needed = max((model.ends[layer] for layer in layers), default=0)
            assert copies.num_there >= max(needed, model.num_outside_pages)
            there.append(copies.num_there)
    assert copies.num_there == model.num_pages
    assert not arriving.is_pending
    return there


@given(stages(), st.integers(0, 30), st.integers(1, 5))
def test_each_layer_finds_its_pages_where_a_forward_waits_in_front_of_it(
    model: Stages, stayed: int, num_ahead: int
) -> None:
    parts = [(), *((layer,) for layer in range(len(model.ends)))]
    there = run(model, model.in_front_of_layers(), parts, stayed, num_ahead)
    needed = accumulate(model.ends, max, initial=model.num_outside_pages)
    assert there == [max(min(stayed, model.num_pages), end) for end in needed]  # and for no more


@given(stages(), st.integers(0, 30), st.integers(1, 5), st.data())
def test_each_layer_finds_its_pages_where_a_forward_waits_only_inside_of_some(
    model: Stages, stayed: int, num_ahead: int, data: st.DataObject
) -> None:
    last = len(model.ends) - 1
    hooked = sorted(data.draw(st.sets(st.integers(0, last), min_size=1)))
    # The first part ends inside of the first of them; each other begins there, ends in the next.
    parts = [tuple(range(hooked[0] + 1))]
    parts += [tuple(range(first, end + 1)) for first, end in pairwise([*hooked, last])]
    run(model, model.inside_layers(hooked), parts, stayed, num_ahead)
