"""Engines whose weights do not fit together, in any order: each is served, none on missing weights.

The workers go on behind a schedule, as in `test_engine_machine`; so what a schedule finds may
differ from run to run, and no rule depends on what there is.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from helpers.fake_engine import FakeEngine
from helpers.house import House
from helpers.served import PAGE_BYTES
from helpers.waiting import await_that
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcached_core import control
from kvcached_core.ledger.bell import wake
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.weights import WeightsWish

NUMBERS = st.integers(0, 2)


class WeightsMachine(RuleBasedStateMachine):
    """Requests come, end and are cancelled; engines sleep and wake for all reasons there are."""

    @initialize(
        num_engines=st.integers(2, 3),
        num_weight_pages=st.integers(1, 8),
        num_more_pages=st.integers(2, 8),
        spares=st.tuples(st.integers(0, 2), st.integers(0, 3)),
        idle_seconds=st.sampled_from([0, 1000]),
        kept_seconds=st.sampled_from([0, 0.01]),
    )
    def start(  # noqa: PLR0917
        self,
        num_engines: int,
        num_weight_pages: int,
        num_more_pages: int,
        spares: tuple[int, int],
        idle_seconds: int,
        kept_seconds: float,
    ) -> None:
        self.num_kv_pages = num_more_pages  # besides page 0 of each engine, when all others sleep
        self.num_pages = num_engines + num_weight_pages + num_more_pages
        self.folder = TemporaryDirectory()
        self.house = House(
            partial(FakeEngine, num_weight_pages=num_weight_pages),
            Path(self.folder.name) / "kv",
            self.num_pages,
            weights="yield",
            min_spare_pages=spares[0],
            max_spare_pages=max(spares),
            idle_seconds=idle_seconds,
            weights_kept_seconds=kept_seconds,
        )
        self.engines: list[FakeEngine] = []
        for number in range(num_engines):
            engine = self.house.start(f"engine-{number}")
            assert isinstance(engine, FakeEngine)
            engine.sleep()  # or the next one's would have no room
            self.engines.append(engine)
        self.num_sent = 0

    @rule(number=NUMBERS, share=st.integers(1, 4), is_cached=st.booleans())
    def a_request_comes(self, number: int, share: int, *, is_cached: bool) -> None:
        self.num_sent += 1
        num_pages = max(self.num_kv_pages // share, 1)
        self.engine(number).send(f"r{self.num_sent}", num_pages, is_cached=is_cached)

    @rule(number=NUMBERS)
    def a_request_grows(self, number: int) -> None:
        engine = self.engine(number)
        for request in engine.running[:1]:
            if request.num_held < self.num_kv_pages * 8:
                engine.grow(request.name)

    @rule(number=NUMBERS, of=st.integers(0, 9))
    def a_request_ends_or_is_cancelled(self, number: int, of: int) -> None:
        engine = self.engine(number)
        requests = [*engine.running, *engine.waiting]
        for request in requests[of : of + 1]:
            engine.end(request.name)

    @rule(number=NUMBERS, num_turns=st.integers(1, 3))
    def an_engine_runs(self, number: int, num_turns: int) -> None:
        for _ in range(num_turns):
            self.engine(number).turn(is_settled=False)

    @rule(number=NUMBERS)
    def an_idle_engine_hears_its_bell(self, number: int) -> None:
        engine = self.engine(number)
        if engine.num_wakes and not engine.has_requests:
            engine.heed()

    @rule(number=NUMBERS, wish=st.sampled_from([WeightsWish.SLEEP, WeightsWish.WAKE]))
    def somebody_wishes(self, number: int, wish: WeightsWish) -> None:
        name = str(self.engine(number).config.name)
        with Ledger(self.house.directory / "host.ledger") as ledger:
            row = next(view.row for view in ledger.view().instances if view.name == name)
            ledger.set_wish(row, wish)
            wake(ledger, [row])

    @rule(number=NUMBERS)
    def an_idle_engine_sleeps(self, number: int) -> None:
        engine = self.engine(number)
        if not engine.has_requests:
            engine.sleep()
            engine.expect(used=1)

    @rule(number=NUMBERS, priority=st.integers(-1, 1))
    def somebody_sets_a_priority(self, number: int, priority: int) -> None:
        name = str(self.engine(number).config.name)
        control.set_priority(name, priority, directory=self.house.directory)

    @rule(number=NUMBERS, num_pages=st.integers(0, 8))
    def a_stranger_takes_and_gives(self, number: int, num_pages: int) -> None:
        weights = self.engine(number).weights
        assert weights is not None
        weights.num_available = min(num_pages, weights.num_pages)

    @invariant()
    def nobody_holds_what_another_one_has(self) -> None:
        if not hasattr(self, "house"):
            return
        with Ledger(self.house.directory / "host.ledger") as ledger:
            view = ledger.view()
        assert sum(one.resident_bytes + one.promised_bytes for one in view.instances) <= (
            view.capacity_bytes
        )
        num_mapped = sum(
            len(engine.memory.arena.resident_pages) + engine.weights.num_resident
            for engine in self.engines
            if engine.weights is not None
        )
        assert num_mapped <= self.num_pages

    def engine(self, number: int) -> FakeEngine:
        return self.engines[number % len(self.engines)]

    def teardown(self) -> None:
        if not hasattr(self, "house"):
            return
        try:
            self.everything_ends()
        finally:
            self.house.close()
            self.folder.cleanup()

    def everything_ends(self) -> None:
        """All that waits gets its turn while others go idle; then nothing is announced."""
        for engine in self.engines:
            if engine.weights is not None:
                engine.weights.num_available = engine.weights.num_pages
        await_that(self.nothing_is_left)
        for engine in self.engines:
            engine.sleep()
            view = engine.view()
            assert (view.resident_bytes, view.static_bytes) == (PAGE_BYTES, 0)
            assert not view.is_waking

    def nothing_is_left(self) -> bool:
        for engine in self.engines:
            if engine.has_requests:
                engine.turn()
                for name in engine.names[:1]:
                    engine.end(name)
            else:
                while engine.num_wakes:
                    engine.heed()
                engine.turn()
            self.nobody_holds_what_another_one_has()
        return not any(engine.has_requests for engine in self.engines)


TestWeightsMachine = WeightsMachine.TestCase
TestWeightsMachine.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
