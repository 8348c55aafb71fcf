"""Weights on their way: each part of a forward finds its own pages, and waits for no others."""

from collections.abc import Iterator
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
from kvcached_core.weights.arriving import Arriving
from kvcached_core.weights.rank import MAP_BATCH_PAGES
from kvcached_core.weights.stages import Points, Stages
from kvcached_core.weights.walks import Walks

POINTS = Points(2, (9, NUM_PAGES))


@pytest.fixture
def ours(driver: FakeDriver, tmp_path: Path) -> Iterator[WeightedRank]:
    """A rank on a GPU whose weights are copied, page-locked, and let arrive."""
    made = WeightedRank(CudaBackend(api=cast("Any", driver)), tmp_path)
    made.start()
    made.weights.lets_arrive = True
    yield made
    made.close()


def coming(ours: WeightedRank, driver: FakeDriver) -> list[int]:
    """Return the pages whose copies are not done."""
    address = ours.image.page_address
    return [page for page in range(NUM_PAGES) if driver.is_copied_under_way(address(page), PAGE)]


def test_a_hold_returns_while_pages_come_and_who_waits_has_those_in_front(
    ours: WeightedRank, driver: FakeDriver
) -> None:
    ours.weights.hold(0)
    assert ours.weights.hold(NUM_PAGES).num_missing_pages == 0
    arriving = ours.weights.arriving
    assert coming(ours, driver) == list(range(NUM_PAGES))
    for num_pages in (1, MAP_BATCH_PAGES, MAP_BATCH_PAGES + 1, 10, NUM_PAGES - 1):
        arriving.wait(num_pages)
        left = coming(ours, driver)
        assert not left or left[0] >= num_pages
        assert len(left) > NUM_PAGES - num_pages - MAP_BATCH_PAGES
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
    assert coming(ours, driver) == list(range(14, NUM_PAGES))
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
def test_pages_that_cannot_be_marked_are_waited_for_as_ever(
    ours: WeightedRank, driver: FakeDriver, call: str
) -> None:
    ours.weights.hold(0)
    first = driver.calls[call] + 2  # the third batch
    driver.fails = lambda name, number: (
        Result.CUDA_ERROR_UNKNOWN if (name, number) == (call, first) else None
    )
    with pytest.raises(BackendError, match=call):
        ours.weights.hold(NUM_PAGES)
    assert coming(ours, driver) == []
    ours.check(3 * MAP_BATCH_PAGES)
    ours.weights.hold(NUM_PAGES)
    ours.weights.arriving.finish()
    ours.check(NUM_PAGES)


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


# Walks


def walked(walks: Walks, passed: tuple[int, ...], *, is_whole: bool = True) -> bool:
    """Run a step that passes some points; return whether it had a walk."""
    with walks.step(is_whole=is_whole) as walk:
        for point in passed if walk is not None else ():
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
        walk.pass_point(0)
        walk.pass_point(1)
    assert not walks.is_due
    asleep_and_back(ours)
    assert walks.is_due
    with walks.step(is_whole=True) as walk:
        assert walk is not None
        assert coming(ours, driver) == list(range(4, NUM_PAGES))
        for _ in range(2):
            walk.pass_point(0)
            assert coming(ours, driver) == list(range(12, NUM_PAGES))
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

    def mark_copies(self) -> "Waits":
        return Waits(self, self.num_begun)


class Waits:
    """A mark behind so many pages."""

    def __init__(self, copies: Copies, num_pages: int) -> None:
        self.copies, self.num_pages = copies, num_pages

    def join(self, _stream: int) -> None:
        self.copies.num_there = max(self.copies.num_there, self.num_pages)

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
    model: Stages, points: Points, parts: list[tuple[int, ...]], stayed: int, batch: int
) -> list[int]:
    """Run a forward that reads some layers between two points; return what was there for each."""
    copies = Copies()
    copies.num_there = stayed = min(stayed, model.num_pages)
    arriving = Arriving(cast("Any", copies), lambda: 0)
    for end in range(stayed + batch, model.num_pages + batch, batch):
        copies.num_begun = min(end, model.num_pages)
        arriving.add(stayed, copies.num_begun)
    walks = Walks(arriving, points)
    walks._is_trusted = True
    there = []
    with walks.step(is_whole=True) as walk:
        assert walk is not None
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
    model: Stages, stayed: int, batch: int
) -> None:
    parts = [(), *((layer,) for layer in range(len(model.ends)))]
    there = run(model, model.in_front_of_layers(), parts, stayed, batch)
    needed = accumulate(model.ends, max, initial=model.num_outside_pages)
    # It has waited for no page of a later batch.
    assert all(one <= max(stayed, end + batch - 1) for one, end in zip(there, needed, strict=True))


@given(stages(), st.integers(0, 30), st.integers(1, 5), st.data())
def test_each_layer_finds_its_pages_where_a_forward_waits_only_inside_of_some(
    model: Stages, stayed: int, batch: int, data: st.DataObject
) -> None:
    last = len(model.ends) - 1
    hooked = sorted(data.draw(st.sets(st.integers(0, last), min_size=1)))
    # The first part ends inside of the first of them; each other begins there, ends in the next.
    parts = [tuple(range(hooked[0] + 1))]
    parts += [tuple(range(first, end + 1)) for first, end in pairwise([*hooked, last])]
    run(model, model.inside_layers(hooked), parts, stayed, batch)
