"""An engine and its neighbour on one device, in any order: nobody holds what another one has.

The workers go on behind a schedule, as they do in an engine: rules do not wait for them. So what a
schedule finds may differ from run to run, and no rule depends on what there is.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from helpers.fake_engine import FakeEngine
from helpers.house import NEIGHBOUR, House
from helpers.served import ENGINE, PAGE_BYTES
from helpers.waiting import await_that
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcached_core import control
from kvcached_core.ledger.ledger import Ledger

NUMBERS_OF_PAGES = [7, 8, 15, 16, 31, 33]
# Bytes of a block in one plane, and planes: 1, 2, 7, 8, 21 and 64 blocks a page.
SHAPES = [(1 << 21, 1), (1 << 20, 1), (1 << 15, 9), (1 << 16, 4), (1 << 15, 3), (1 << 15, 1)]


class EngineMachine(RuleBasedStateMachine):
    """Requests come and end, copies too, a neighbour takes and gives, and somebody sets limits."""

    @initialize(
        num_pages=st.sampled_from(NUMBERS_OF_PAGES),
        shape=st.sampled_from(SHAPES),
        spares=st.tuples(st.integers(0, 2), st.integers(0, 3)),
        idle_seconds=st.sampled_from([0, 1000]),
        copies_freed=st.booleans(),
    )
    def start(
        self,
        num_pages: int,
        shape: tuple[int, int],
        spares: tuple[int, int],
        idle_seconds: int,
        *,
        copies_freed: bool,
    ) -> None:
        self.num_pages = num_pages
        self.folder = TemporaryDirectory()
        block_bytes, num_planes = shape
        make = partial(FakeEngine, block_bytes=block_bytes, num_planes=num_planes)
        self.house = House(make, Path(self.folder.name) / "kv", num_pages)
        served = self.house.start(
            min_spare_pages=spares[0],
            max_spare_pages=max(spares),
            idle_seconds=idle_seconds,
        )
        assert isinstance(served, FakeEngine)
        self.served = served
        served.copies_freed = copies_freed
        self.neighbour = self.house.neighbour()
        self.num_sent = self.num_copies = 0
        self.copies: dict[int, set[int]] = {}  # the pages of each that is open
        self.num_used = self.num_idle = 0  # pages of the neighbour

    @rule(share=st.integers(2, 5), is_cached=st.booleans())
    def a_request_comes(self, share: int, *, is_cached: bool) -> None:
        self.num_sent += 1
        num_pages = max(self.num_pages // share, 1)
        self.served.send(f"r{self.num_sent}", num_pages, is_cached=is_cached)

    @rule(number=st.integers(0, 9))
    def a_request_grows(self, number: int) -> None:
        for name in self.served.names[number : number + 1]:
            self.served.grow(name)

    @rule(number=st.integers(0, 9))
    def a_request_ends(self, number: int) -> None:
        requests = [*self.served.running, *self.served.waiting]
        for request in requests[number : number + 1]:
            self.served.end(request.name)

    @rule(num_turns=st.integers(1, 3))
    def the_engine_runs(self, num_turns: int) -> None:
        for _ in range(num_turns):
            self.served.turn(is_settled=False)

    @rule()
    def an_idle_engine_hears_its_bell(self) -> None:
        if self.served.num_wakes and not self.served.has_requests:
            self.served.heed()

    @rule()
    def an_idle_engine_sleeps(self) -> None:
        if not self.served.has_requests:
            self.served.sleep()
            self.copies.clear()
            assert self.served.memory.arena.resident_bytes == PAGE_BYTES
            self.served.engine.answer_ring()  # its loop comes to what was asked before
            self.served.expect(used=1)

    @rule(number=st.integers(0, 9), step=st.integers(1, 9))
    def a_copy_of_a_request_begins(self, number: int, step: int) -> None:
        for request in self.served.running[number : number + 1]:
            ids = self.served.block_ids(request)[::step]
            self.num_copies += 1
            self.served.pages.hold(ids, self.num_copies)
            self.copies[self.num_copies] = set(map(self.served.pages.geometry.page_of, ids))

    @rule(number=st.integers(0, 9))
    def a_copy_ends(self, number: int) -> None:
        for copy in [*self.copies][number : number + 1]:
            self.served.engine.release(copy)
            del self.copies[copy]

    @rule(num_pages=st.integers(1, 40))
    def the_neighbour_takes(self, num_pages: int) -> None:
        self.num_used += self.neighbour.take(num_pages)

    @rule(num_pages=st.integers(1, 40))
    def the_neighbour_rests(self, num_pages: int) -> None:
        num_pages = min(num_pages, self.num_used)
        self.neighbour.rest(num_pages)
        self.num_used -= num_pages
        self.num_idle += num_pages

    @rule()
    def the_neighbour_gives(self) -> None:
        self.neighbour.give(self.num_idle)
        self.num_idle = 0

    @rule(num_pages=st.integers(2, 40))
    def somebody_sets_a_limit(self, num_pages: int) -> None:
        limit = f"{min(num_pages, self.num_pages) * PAGE_BYTES}"
        control.set_limit(ENGINE, limit, directory=self.house.directory, wait_seconds=0)

    @rule()
    def somebody_lifts_the_limit(self) -> None:
        control.set_limit(ENGINE, "none", directory=self.house.directory, wait_seconds=0)

    @rule()
    def somebody_trims(self) -> None:
        control.trim([ENGINE], directory=self.house.directory, wait_seconds=0)

    @rule()
    def somebody_looks(self) -> None:
        self.served.turn()
        page_of, ids_of = self.served.pages.geometry.page_of, self.served.block_ids
        live = {page_of(block) for one in self.served.running for block in ids_of(one)} | {0}
        cached = {page_of(block.block_id) for block in self.served.cached} - live
        num_resident = len(self.served.memory.arena.resident_pages)
        asked_bytes = self.served.view().asked_bytes if self.copies else 0
        self.served.expect(
            is_waiting=None,
            asked=asked_bytes // PAGE_BYTES,
            used=len(live),
            cached=len(cached),
            idle=num_resident - len(live) - len(cached),
            owed=self.served.engine.giving.owed_pages,
        )

    @invariant()
    def nobody_is_promised_what_another_one_has(self) -> None:
        if not hasattr(self, "house"):
            return
        with Ledger(self.house.directory / "host.ledger") as ledger:
            view = ledger.view()
        held = {one.name: one.resident_bytes + one.promised_bytes for one in view.instances}
        assert sum(held.values()) <= view.capacity_bytes
        assert held[NEIGHBOUR] == (self.num_used + self.num_idle) * PAGE_BYTES

    @invariant()
    def no_page_goes_of_which_a_copy_is_open(self) -> None:
        if hasattr(self, "house"):
            held = set().union(*self.copies.values())
            assert all(self.served.memory.arena.is_resident(page) for page in held)

    def teardown(self) -> None:
        if not hasattr(self, "house"):
            return
        try:
            self.everything_ends()
        finally:
            self.house.close()
            self.folder.cleanup()

    def everything_ends(self) -> None:
        """All that waits gets its turn when memory comes back; then nothing is left."""
        self.somebody_lifts_the_limit()
        for copy in self.copies:
            self.served.engine.release(copy)
        self.copies.clear()
        self.neighbour.rest(self.num_used)
        self.neighbour.give(self.num_used + self.num_idle)
        await_that(self.nothing_is_left)
        self.served.sleep()
        self.served.expect(used=1)
        assert self.neighbour.take(self.num_pages) == self.num_pages - 1

    def nothing_is_left(self) -> bool:
        self.served.turn()
        for name in self.served.names[:1]:
            self.served.end(name)
        return not self.served.has_requests


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
