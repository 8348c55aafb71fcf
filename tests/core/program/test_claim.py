"""What a program has and may still have, in a ledger whose neighbour takes all that it can get."""

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcached_core.ledger.file import PROGRAM
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.ledger.view import InstanceView
from kvcached_core.program.claim import Claim, move

CAPACITY, MOST = 64, 96
SIZES = st.integers(0, CAPACITY)


class ClaimMachine(RuleBasedStateMachine):
    """A device that only ledgers count, or one whose driver sees what a program allocates."""

    @initialize(has_driver=st.booleans(), needed=st.integers(1, CAPACITY))
    def begin(self, *, has_driver: bool, needed: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        path = ledger_directory(Path(self.folder.name) / "kv") / "host.ledger"
        self.allocated = self.mapped = 0  # by the program; by the neighbour
        free = (lambda: CAPACITY - self.allocated - self.mapped) if has_driver else None
        self.has_driver = has_driver
        self.ledger = Ledger(path, CAPACITY, free)
        self.neighbour = self.ledger.register(name="engine", engine="test", page_bytes=1)
        self.program = self.ledger.register(name="train", engine=PROGRAM)
        self.ledger.announce(self.program, needed)
        self.claim = Claim(needed)

    def teardown(self) -> None:
        self.ledger.close()
        self.folder.cleanup()

    @rule(size=st.integers(0, MOST))
    def allocate_or_free(self, size: int) -> None:
        """The program has so much now, as far as the device has it; nobody has looked yet."""
        self.allocated = min(size, CAPACITY - self.mapped)

    @rule()
    def look(self) -> None:
        after = Claim(self.claim.needed_bytes, self.allocated)
        change = move(self.claim, after)
        self.claim = after
        self.ledger.settle_program(
            self.program,
            mapped_bytes=change.mapped_bytes,
            unmapped_bytes=change.unmapped_bytes,
            announced_bytes=change.announced_bytes,
        )

    @rule(size=SIZES, is_waiting=st.booleans())
    def take(self, *, size: int, is_waiting: bool) -> None:
        """The neighbour maps all that it is promised, and never what is the program's."""
        free = CAPACITY - self.mapped - self.claim.held_bytes - self.claim.announced_bytes
        granted = self.ledger.promise(self.neighbour, size, 1, is_waiting=is_waiting)
        assert granted <= max(free, 0)
        if not self.has_driver or self.allocated == self.claim.held_bytes:
            assert granted == min(size, max(free, 0))
        self.ledger.settle(self.neighbour, mapped_bytes=granted, used_bytes=0, cached_bytes=0)
        self.mapped += granted

    @precondition(lambda self: self.mapped)
    @rule(size=SIZES)
    def give(self, size: int) -> None:
        size = min(size, self.mapped)
        self.mapped -= size
        self.ledger.settle(self.neighbour, unmapped_bytes=size, used_bytes=0, cached_bytes=0)

    @invariant()
    def each_byte_counts_once(self) -> None:
        row = self.view("train")
        assert row.resident_bytes == row.weights_bytes == self.claim.held_bytes
        assert row.static_bytes == self.claim.announced_bytes
        assert row.taken_bytes == max(self.claim.needed_bytes, self.claim.held_bytes)
        assert row.held_bytes == row.weights_offered_bytes == 0  # nobody may ask it for any

    @invariant()
    def what_it_said_to_need_fits(self) -> None:
        """Beside the neighbour there is room for it, unless others than engines took that."""
        if self.allocated <= self.claim.held_bytes <= self.claim.needed_bytes:
            assert self.mapped + self.claim.needed_bytes <= CAPACITY

    def view(self, name: str) -> InstanceView:
        return next(one for one in self.ledger.view().instances if one.name == name)


TestClaim = ClaimMachine.TestCase
TestClaim.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
