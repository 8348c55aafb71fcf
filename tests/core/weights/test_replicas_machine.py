"""Whatever two replicas give, have back and change, in any order: each has its own weights."""

import shutil
import tempfile
from pathlib import Path

from helpers.replica_ranks import ReplicaRank
from helpers.weight_ranks import NUM_PAGES, PAGE
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

WORDS = PAGE // 8
WHO = st.sampled_from(["one", "other"])


class ReplicasMachine(RuleBasedStateMachine):
    """Two ranks with the same weights at first, which end and start again now and then."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = Path(tempfile.mkdtemp())
        self.ranks = {name: self.start(name) for name in ("one", "other")}
        self.num_pages = dict.fromkeys(self.ranks, NUM_PAGES)

    def start(self, name: str) -> ReplicaRank:
        return ReplicaRank(self._folder, name, num_budget_pages=8 * NUM_PAGES).start()

    @rule(who=WHO, num_pages=st.integers(0, NUM_PAGES))
    def hold(self, who: str, num_pages: int) -> None:
        assert self.ranks[who].weights.hold(num_pages).num_resident_pages == num_pages
        self.num_pages[who] = num_pages

    @precondition(lambda self: all(self.num_pages.values()))
    @rule(who=WHO, data=st.data(), value=st.integers(-3, 3))
    def change(self, who: str, data: st.DataObject, value: int) -> None:
        word = data.draw(st.integers(0, self.num_pages[who] * WORDS - 1))
        self.ranks[who].change(word, value)

    @rule(who=WHO)
    def mark_dirty(self, who: str) -> None:
        self.ranks[who].weights.mark_dirty()

    @rule(who=WHO)
    def end_and_start(self, who: str) -> None:
        self.ranks[who].close()
        self.ranks[who] = self.start(who)
        self.num_pages[who] = NUM_PAGES

    @invariant()
    def is_right(self) -> None:
        for name, rank in self.ranks.items():
            rank.check(self.num_pages[name])

    def teardown(self) -> None:
        for rank in self.ranks.values():
            rank.close()
        shutil.rmtree(self._folder)


TestReplicas = ReplicasMachine.TestCase
TestReplicas.settings = settings(max_examples=8, stateful_step_count=12, deadline=None)
