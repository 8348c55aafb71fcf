"""Engines that start beside each other, as far as their ledger sees it, step by step."""

from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

from kvcached_core.engine.starting import Start, StartLine
from kvcached_core.ledger.expected import COPY_SECONDS, START_SECONDS, Patience
from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.policy import Policy
from kvcached_core.ledger.shortage import Need, short_of
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import MIB

PAGE = 2 * MIB
NUM_WEIGHTS = 6  # pages of each
PATIENCE = 10.0  # rounds
NUM_COPY_STEPS = 4


class Stage(IntEnum):
    """How far a start is."""

    WAITING = 0  # for room for its weights
    LOADING = 1
    PAGING = 2  # it waits for its first page
    COPYING = 3
    READY = 4
    FAILED = 5


class Starter:
    """One engine; each step of it is short, and waits for nothing.

    Args:
        path: The ledger.
        num_pages: What all share, in pages.
        name: What it is called.
        clock: For how long it waits.
        has_two_rows: Whether its worker has a row of its own until the first page is there.
        priority: Its priority.
    """

    def __init__(
        self,
        path: Path,
        num_pages: int,
        name: str,
        clock: Callable[[], float],
        *,
        has_two_rows: bool = True,
        priority: int = 0,
    ) -> None:
        self.ledger = Ledger(path, num_pages * PAGE)
        self.name, self.stage = name, Stage.WAITING
        self._clock, self._policy = clock, Policy(priority=priority)
        self._has_two_rows = has_two_rows
        self._num_copied = 0
        self.row = self._register(f"{name}-starting" if has_two_rows else name)
        self.needs = [Need(self.ledger, self.row, NUM_WEIGHTS * PAGE)]
        self.line = StartLine(self.needs, Start(PAGE, may_yield=True))
        self.patience = Patience(PATIENCE, clock=clock)

    @property
    def has_ended(self) -> bool:
        """Whether its start is over."""
        return self.stage >= Stage.READY

    def step(self) -> None:
        """Go on as far as it can now."""
        if self.stage is Stage.WAITING:
            if self.line.look():
                self.stage = Stage.LOADING
            elif self._is_over(self.needs):
                self.fail()
        elif self.stage is Stage.LOADING:
            self._arrive()
        elif self.stage is Stage.PAGING:
            self._take_page()
        elif self.stage is Stage.COPYING:
            self._num_copied += 1
            self.ledger.expect_weights(self.row, COPY_SECONDS)
            if self._num_copied > NUM_COPY_STEPS:
                self.stage = Stage.READY
                self._offer()
        elif self.stage is Stage.READY:
            self.answer()

    def fail(self) -> None:
        """End, with everything it holds."""
        self.stage = Stage.FAILED
        for row in {self.row, self.needs[0].row}:
            self.ledger.unregister(row)

    def kill(self) -> None:
        """End without a word."""
        self.stage = Stage.FAILED
        self.ledger.close()

    def view(self) -> InstanceView:
        """Return what the ledger says of it."""
        return next(view for view in self.ledger.view().instances if view.row == self.row)

    def answer(self) -> None:
        """Give what others ask for: weights, as its one page never goes."""
        asked_bytes = self.ledger.wanted(self.row).asked_bytes
        num_bytes = min(asked_bytes, self.view().weights_bytes)
        if asked_bytes:
            self.ledger.settle_weights(self.row, unmapped_bytes=num_bytes)
            self._offer()
            self.ledger.acknowledge(self.row)

    def _register(self, name: str) -> RowKey:
        return self.ledger.register(name=name, engine="test", page_bytes=PAGE, policy=self._policy)

    def _arrive(self) -> None:
        if self._has_two_rows:
            self.row = self._register(self.name)
            self.ledger.announce(self.needs[0].row, NUM_WEIGHTS * PAGE)
        else:
            self._join()
        self.page_needs = [Need(self.ledger, self.row, PAGE)]
        self.patience = Patience(PATIENCE, has_loaded=True, clock=self._clock)
        self.stage = Stage.PAGING

    def _take_page(self) -> None:
        self.ledger._look_around_ns = 0  # a round is long enough to look for rows of the dead
        if self.ledger.promise(self.row, PAGE, PAGE):
            if self._has_two_rows:
                self._join()
                self.ledger.unregister(self.needs[0].row)
                self.needs = self.page_needs
            self.ledger.settle(self.row, mapped_bytes=PAGE, used_bytes=PAGE, cached_bytes=0)
            self.stage = Stage.COPYING
            return
        self.ledger.ask_peers(self.row, PAGE)
        if self._is_over(self.page_needs):
            self.fail()

    def _join(self) -> None:
        self.ledger.settle_weights(self.row, mapped_bytes=NUM_WEIGHTS * PAGE)
        self.ledger.expect_weights(self.row, START_SECONDS)

    def _offer(self) -> None:
        self.ledger.offer_weights(self.row, self.view().weights_bytes)

    def _is_over(self, needs: list[Need]) -> bool:
        short = short_of(needs)
        return self.patience.is_over((need.ledger.view(), need.row) for need in short)
