"""The page keeper: what a step needs is there when it returns, the rest happens behind its back."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from helpers.backends import CountingBackend, FaultyBackend, Layer, Result

from kvcached_core.errors import BackendError, LedgerError, OutOfMemoryError, PageKeeperError
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import choose_geometry
from kvcached_core.memory.keeper import PageChanges, PageKeeper
from kvcached_core.memory.vmm.backend import Backend
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import MIB

# A thread that is gone is waited for by nobody, or for ever.

GEOMETRY = choose_geometry(
    block_bytes=65536, num_planes=8, granularity_bytes=2 * MIB, target_page_bytes=2 * MIB
)
NUM_PAGES = 32


class HeldFence:
    """A fence that is passed when the test says so."""

    def __init__(self) -> None:
        self.passed = threading.Event()
        self.reached = threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self.passed.wait(30)


class Setup:
    """A keeper over host memory, with its reports added up."""

    def __init__(self) -> None:
        self.backend = CountingBackend(FaultyBackend(HostBackend(), lambda *_: False))
        self.arena = Arena(self.backend, GEOMETRY, NUM_PAGES)
        self.mapped = self.unmapped = self.spared = self.stuck = 0
        self.error: Exception | None = None
        self.threads: set[str] = set()
        self._lock = threading.Lock()
        self.keeper = PageKeeper(self.arena, self.report)

    def report(self, changes: PageChanges) -> None:
        with self._lock:
            self.threads.add(threading.current_thread().name)
            self.mapped += changes.num_mapped
            self.unmapped += changes.num_unmapped
            self.spared += changes.num_spared
            self.stuck += changes.num_stuck
        if self.error is not None:
            raise self.error


@pytest.fixture
def setup() -> Iterator[Setup]:
    made = Setup()
    yield made
    made.keeper.close()
    assert made.mapped - made.unmapped == len(made.arena.resident_pages)
    made.arena.close()


def passed() -> HeldFence:
    fence = HeldFence()
    fence.passed.set()
    return fence


def test_what_is_needed_now_is_mapped_on_return_by_the_caller(setup: Setup) -> None:
    setup.keeper.map_now([0, 5])
    assert setup.arena.resident_pages == [0, 5]
    assert setup.threads == {threading.current_thread().name}


def test_spare_pages_and_pages_given_back_are_no_work_of_the_caller(setup: Setup) -> None:
    setup.keeper.map_soon(range(10))
    setup.keeper.wait()
    setup.keeper.map_now(range(10))
    setup.keeper.unmap_behind(range(10), passed())
    setup.keeper.wait()
    assert (setup.mapped, setup.unmapped, setup.spared) == (10, 10, 0)
    assert setup.threads == {"kvcached-map", "kvcached-unmap"}
    mine = setup.backend.num_calls_of_thread(threading.get_ident())
    assert mine == 1  # the reservation of the arena


def test_a_page_stays_mapped_until_its_fence_is_passed(setup: Setup) -> None:
    setup.keeper.map_now([1, 2])
    fence = HeldFence()
    setup.keeper.unmap_behind([1], fence)
    assert fence.reached.wait(30)
    setup.keeper.map_now([3])
    assert setup.arena.resident_pages == [1, 2, 3]
    fence.passed.set()
    setup.keeper.wait()
    assert setup.arena.resident_pages == [2, 3]


def test_who_waits_for_a_while_goes_on_while_an_order_is_left(setup: Setup) -> None:
    setup.keeper.map_now([1])
    fence = HeldFence()
    setup.keeper.unmap_behind([1], fence)
    setup.keeper.wait(0.01)
    assert setup.arena.resident_pages == [1]
    fence.passed.set()
    setup.keeper.wait(30)
    assert setup.arena.resident_pages == []


def test_a_page_needed_again_before_its_fence_is_passed_stays(setup: Setup) -> None:
    setup.keeper.map_now([1, 2, 3])
    fence = HeldFence()
    setup.keeper.unmap_behind([1, 2, 3], fence)
    assert fence.reached.wait(30)
    setup.keeper.map_now([1])
    setup.keeper.map_soon([2])
    fence.passed.set()
    setup.keeper.wait()
    assert sorted(setup.arena.resident_pages) == [1, 2]
    assert (setup.mapped, setup.unmapped, setup.spared) == (3, 1, 2)


def test_waiting_for_a_fence_does_not_hold_up_mapping(setup: Setup) -> None:
    setup.keeper.map_now([1])
    fence = HeldFence()
    setup.keeper.unmap_behind([1], fence)
    assert fence.reached.wait(30)
    setup.keeper.map_soon([7])
    setup.keeper.map_now([7])
    assert setup.arena.is_resident(7)
    fence.passed.set()


def test_a_page_goes_behind_its_own_fence_and_not_behind_an_earlier_one(setup: Setup) -> None:
    setup.keeper.map_now([1, 2])
    first, second = HeldFence(), HeldFence()
    setup.keeper.unmap_behind([1], first)
    assert first.reached.wait(30)
    setup.keeper.unmap_behind([2], second)
    first.passed.set()
    assert second.reached.wait(30)
    assert setup.arena.resident_pages == [2]
    second.passed.set()
    setup.keeper.wait()
    assert setup.arena.resident_pages == []


def test_a_page_given_back_while_it_is_mapped_ahead_goes_when_it_is_there(setup: Setup) -> None:
    faulty = setup.backend.inner
    assert isinstance(faulty, FaultyBackend)
    begun, go_on = threading.Event(), threading.Event()

    def hold(verb: str, _number: int) -> bool:
        if verb == "create":
            begun.set()
            assert go_on.wait(30)
        return False

    faulty.fails = hold
    setup.keeper.map_soon([1])
    assert begun.wait(30)
    fence = passed()
    setup.keeper.unmap_behind([1], fence)
    assert fence.reached.wait(30)
    threading.Timer(0.05, go_on.set).start()
    setup.keeper.wait()
    assert setup.arena.resident_pages == []
    assert (setup.mapped, setup.unmapped, setup.spared) == (1, 1, 0)


@pytest.mark.parametrize("is_given_back_again", [False, True])
@pytest.mark.parametrize("is_spare", [False, True])
def test_a_page_wanted_while_it_is_unmapped_is_mapped_again_when_it_is_gone(
    setup: Setup, *, is_spare: bool, is_given_back_again: bool
) -> None:
    faulty = setup.backend.inner
    assert isinstance(faulty, FaultyBackend)
    setup.keeper.map_now([1])
    begun, go_on = threading.Event(), threading.Event()

    def hold(verb: str, _number: int) -> bool:
        if verb == "unmap":
            begun.set()
            assert go_on.wait(30)
        return False

    faulty.fails = hold
    setup.keeper.unmap_behind([1], passed())
    assert begun.wait(30)
    if is_given_back_again:
        setup.keeper.map_soon([1])
        setup.keeper.unmap_behind([1], passed())
    threading.Timer(0.05, go_on.set).start()
    if is_spare:
        setup.keeper.map_soon([1])
    else:
        setup.keeper.map_now([1])
    setup.keeper.wait()
    assert setup.arena.resident_pages == [1]
    assert (setup.mapped, setup.unmapped, setup.spared) == (2, 1, is_given_back_again)


def test_an_order_to_map_that_is_taken_back_is_reported(setup: Setup) -> None:
    first = HeldFence()
    setup.keeper.map_now([1])
    setup.keeper.unmap_behind([1], first)
    assert first.reached.wait(30)
    setup.keeper.unmap_behind([9], passed())  # ordered as spare before, never begun
    first.passed.set()
    setup.keeper.wait()
    assert (setup.mapped, setup.unmapped, setup.spared) == (1, 1, 1)


def test_a_spare_page_that_cannot_be_mapped_is_mapped_when_it_is_needed(setup: Setup) -> None:
    faulty = setup.backend.inner
    assert isinstance(faulty, FaultyBackend)
    faulty.fails = lambda verb, _number: verb == "create"
    setup.keeper.map_soon([4])
    setup.keeper.wait()
    assert not setup.arena.is_resident(4)
    with pytest.raises(OutOfMemoryError):
        setup.keeper.map_now([4])
    faulty.fails = lambda *_: False
    setup.keeper.map_now([4])
    assert setup.arena.is_resident(4)


@pytest.mark.parametrize(("verb", "num_left"), [("unmap", 1), ("release", 0)])
def test_a_failing_unmap_does_not_stop_the_next_ones(
    setup: Setup, verb: str, num_left: int
) -> None:
    faulty = setup.backend.inner
    assert isinstance(faulty, FaultyBackend)
    setup.keeper.map_now(range(8))
    faulty.fails = lambda called, number: (called, number) == (verb, 0)
    setup.keeper.unmap_behind(range(8), passed())
    setup.keeper.wait()
    assert len(setup.arena.resident_pages) == num_left
    assert setup.unmapped == 8 - num_left


def test_threads_that_order_at_random_leave_what_was_ordered_last(setup: Setup) -> None:
    import random

    rng = random.Random(0)
    wanted: dict[int, bool] = {}
    for _ in range(400):
        pages = rng.sample(range(NUM_PAGES), 4)
        up = rng.random() < 0.5
        if up and rng.random() < 0.5:
            setup.keeper.map_now(pages)
            assert all(setup.arena.is_resident(page) for page in pages)
        elif up:
            setup.keeper.map_soon(pages)
        else:
            setup.keeper.unmap_behind(pages, passed())
        wanted.update(dict.fromkeys(pages, up))
    setup.keeper.wait()
    assert sorted(setup.arena.resident_pages) == sorted(page for page, up in wanted.items() if up)


class Recorder(Layer):
    """A layer that writes down what is called, in which thread."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.calls: list[tuple[str, str]] = []

    def _call(
        self, verb: str, num_bytes: int, function: Callable[..., Result], *args: object
    ) -> Result:
        self.calls.append((threading.current_thread().name, verb))
        return function(*args)


@pytest.mark.parametrize("is_spare", [False, True])
def test_a_page_is_reported_when_its_zeros_are_there_and_not_before(*, is_spare: bool) -> None:
    recorder = Recorder(HostBackend())
    arena = Arena(recorder, GEOMETRY, NUM_PAGES)
    thread = "kvcached-map" if is_spare else threading.current_thread().name

    def report(_changes: PageChanges) -> None:
        recorder.calls.append((threading.current_thread().name, "report"))

    keeper = PageKeeper(arena, report)
    if is_spare:
        keeper.map_soon(range(9))
        keeper.wait()
    else:
        keeper.map_now(range(9), 7)
    verbs = [verb for name, verb in recorder.calls if name == thread]
    ends = [number for number, verb in enumerate(verbs) if verb == "report"]
    assert ends
    behind = "synchronize" if is_spare else "join"
    for start, end in pairwise([-1, *ends]):
        batch = verbs[start + 1 : end]
        assert batch[-1] == behind
        assert "zero" in batch[:-1]
    keeper.close()
    arena.close()


def test_a_page_whose_zeros_cannot_be_waited_for_is_not_mapped(setup: Setup) -> None:
    faulty = setup.backend.inner
    assert isinstance(faulty, FaultyBackend)
    faulty.fails = lambda verb, _number: verb == "join"
    with pytest.raises(OutOfMemoryError):
        setup.keeper.map_now([1, 2])
    assert setup.arena.resident_pages == []
    assert setup.mapped == 0


@pytest.mark.parametrize("undo", ["unmap", "release"])
@pytest.mark.parametrize("verb", ["create", "zero", "join"])
@pytest.mark.parametrize("is_spare", [False, True])
def test_pages_are_counted_once_although_a_map_of_them_could_not_be_undone(
    setup: Setup, verb: str, undo: str, *, is_spare: bool
) -> None:
    faulty = setup.backend.inner
    assert isinstance(faulty, FaultyBackend)
    faulty.fails = lambda called, number: (
        called == undo or (called == verb and (verb != "create" or number == 2))
    )
    if is_spare:
        setup.keeper.map_soon([1, 2, 3])
        setup.keeper.wait()
    else:
        with pytest.raises(OutOfMemoryError, match=verb):
            setup.keeper.map_now([1, 2, 3])
    faulty.fails = lambda *_: False
    setup.keeper.map_now([1, 2, 3])
    assert (setup.mapped, setup.spared) == (3, 0)
    setup.keeper.unmap_behind([1, 2, 3], passed())
    setup.keeper.wait()
    assert (setup.mapped, setup.unmapped, setup.stuck) == (3, 3, 0)


def test_a_page_that_cannot_be_unmapped_is_told_and_is_wanted_again_without_memory(
    setup: Setup,
) -> None:
    faulty = setup.backend.inner
    assert isinstance(faulty, FaultyBackend)
    setup.keeper.map_now(range(6))
    faulty.fails = lambda verb, _number: verb == "unmap"
    setup.keeper.unmap_behind(range(6), passed())
    setup.keeper.wait()
    assert (setup.unmapped, setup.stuck, setup.spared) == (0, 6, 0)
    setup.keeper.map_now([0, 1])  # each was promised again
    assert setup.spared == 2
    setup.keeper.map_now([0, 1])  # the same orders once more: nothing was promised
    setup.keeper.map_soon([2])
    setup.keeper.wait()
    assert setup.spared == 3
    faulty.fails = lambda *_: False
    setup.keeper.unmap_behind(range(6), passed())
    setup.keeper.wait()
    assert (setup.mapped, setup.unmapped, setup.stuck, setup.spared) == (6, 6, 6, 3)


def test_a_page_that_stayed_and_is_given_back_again_and_kept_was_promised_once(
    setup: Setup,
) -> None:
    faulty = setup.backend.inner
    assert isinstance(faulty, FaultyBackend)
    setup.keeper.map_now([1])
    faulty.fails = lambda verb, _number: verb == "unmap"
    setup.keeper.unmap_behind([1], passed())
    setup.keeper.wait()
    faulty.fails = lambda *_: False
    fence = HeldFence()
    setup.keeper.unmap_behind([1], fence)
    setup.keeper.map_now([1])
    fence.passed.set()
    setup.keeper.wait()
    assert setup.arena.is_resident(1)
    assert (setup.unmapped, setup.stuck, setup.spared) == (0, 1, 1)


def test_a_spare_page_wanted_while_its_unmap_fails_needs_no_memory(setup: Setup) -> None:
    faulty = setup.backend.inner
    assert isinstance(faulty, FaultyBackend)
    setup.keeper.map_now([1])
    begun, go_on = threading.Event(), threading.Event()

    def fail(verb: str, _number: int) -> bool:
        if verb == "unmap":
            begun.set()
            assert go_on.wait(30)
        return verb == "unmap"

    faulty.fails = fail
    setup.keeper.unmap_behind([1], passed())
    assert begun.wait(30)
    setup.keeper.map_soon([1])
    go_on.set()
    setup.keeper.wait()
    assert setup.arena.is_resident(1)
    assert (setup.mapped, setup.unmapped, setup.stuck, setup.spared) == (1, 0, 1, 1)
    faulty.fails = lambda *_: False


def every_call(keeper: PageKeeper) -> list[Callable[[], None]]:
    return [
        lambda: keeper.map_now([1]),
        lambda: keeper.map_soon([2]),
        lambda: keeper.unmap_behind([3], passed()),
        keeper.wait,
        keeper.close,
    ]


@pytest.mark.parametrize("is_spare", [False, True])
@pytest.mark.parametrize("error", [ValueError("released"), LedgerError("row is gone")])
def test_a_thread_that_ends_ends_every_call_with_its_reason(
    error: Exception, *, is_spare: bool
) -> None:
    setup = Setup()
    setup.keeper.map_now([1])
    setup.error = error
    if is_spare:
        setup.keeper.map_soon([1, 2])
    else:
        setup.keeper.unmap_behind([1], passed())
    ending = setup.keeper._threads[0 if is_spare else 1]
    ending.join(30)
    for call in every_call(setup.keeper):
        with pytest.raises(PageKeeperError, match=f"{type(error).__name__}: {error}") as caught:
            call()
        assert caught.value.__cause__ is error
    assert not any(thread.is_alive() for thread in setup.keeper._threads)
    setup.arena.close()


def test_who_closes_when_one_thread_has_ended_leaves_none_behind() -> None:
    setup = Setup()
    setup.keeper.map_now([1])
    fence = HeldFence()
    setup.keeper.unmap_behind([1], fence)
    assert fence.reached.wait(30)
    setup.error = ValueError("released")
    setup.keeper.map_soon([2])
    setup.keeper._threads[0].join(30)
    threading.Timer(0.05, fence.passed.set).start()
    with pytest.raises(PageKeeperError):
        setup.keeper.close()
    assert not any(thread.is_alive() for thread in setup.keeper._threads)
    setup.arena.close()


def test_a_keeper_that_is_closed_takes_no_order_that_nobody_would_carry_out() -> None:
    setup = Setup()
    setup.keeper.map_now([1])
    setup.keeper.close()
    for order in every_call(setup.keeper)[:3]:
        with pytest.raises(PageKeeperError, match="the keeper is closed"):
            order()
    setup.keeper.wait()
    setup.keeper.close()
    assert setup.arena.resident_pages == [1]
    setup.arena.close()


def test_nobody_waits_for_what_a_close_that_was_interrupted_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup = Setup()
    setup.keeper.map_now([1])
    fence = HeldFence()
    setup.keeper.unmap_behind([1], fence)
    assert fence.reached.wait(30)
    setup.keeper.unmap_behind([1], HeldFence())  # its turn never comes

    def interrupt() -> None:
        threading.Timer(0.05, fence.passed.set).start()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(setup.keeper, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            setup.keeper.close()
    setup.keeper.wait()
    assert setup.arena.resident_pages == [1]
    setup.arena.close()


def test_who_waits_for_a_page_is_told_when_the_thread_that_has_it_ends() -> None:
    setup = Setup()
    begun, go_on = threading.Event(), threading.Event()

    def report(_changes: PageChanges) -> None:
        begun.set()
        assert go_on.wait(30)
        raise ValueError("released")

    setup.keeper._report = report
    setup.keeper.map_soon([1])
    assert begun.wait(30)
    threading.Timer(0.05, go_on.set).start()
    with pytest.raises(PageKeeperError, match="ValueError: released"):
        setup.keeper.map_now([1])
    with pytest.raises(PageKeeperError):
        setup.keeper.close()
    setup.arena.close()


def test_nothing_is_unmapped_behind_a_fence_that_failed(caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup()

    class Broken:
        def wait(self) -> None:
            raise BackendError("cuEventSynchronize", "CUDA_ERROR_LAUNCH_FAILED", 0)

    setup.keeper.map_now([1, 2])
    setup.keeper.unmap_behind([1], Broken())
    with pytest.raises(PageKeeperError, match="CUDA_ERROR_LAUNCH_FAILED"):
        setup.keeper.wait()
    with pytest.raises(PageKeeperError, match="has to be started again"):
        setup.keeper.close()
    assert setup.arena.resident_pages == [1, 2]
    assert setup.unmapped == 0
    assert [record.message for record in caplog.records] == [
        "kvcached: a thread that maps and unmaps pages has ended"
    ]
    setup.arena.close()


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_in_a_forked_child_every_call_is_refused_and_nothing_waits(setup: Setup) -> None:
    fence = HeldFence()
    setup.keeper.map_now([1])
    setup.keeper.unmap_behind([1], fence)
    assert fence.reached.wait(30)
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        num_refused = 0
        for call in every_call(setup.keeper):
            try:
                call()
            except PageKeeperError as error:
                num_refused += "a forked child owns nothing" in str(error)
        os._exit(num_refused)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == len(every_call(setup.keeper))
    fence.passed.set()
    setup.keeper.wait()
    assert setup.arena.resident_pages == []
