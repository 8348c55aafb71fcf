"""Whatever is given, brought back and changed, in any order: the weights are what they shall be."""

import shutil
import tempfile
from pathlib import Path

from helpers.weight_ranks import NUM_PAGES, PAGE, WeightedRank
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcached_core.memory.vmm.host import HostBackend

WORDS = PAGE // 8


class WeightsMachine(RuleBasedStateMachine):
    """One rank, which ends and starts again now and then with the copy that it left."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = Path(tempfile.mkdtemp())
        self._num_budget_pages = NUM_PAGES + 3  # few changed pages find room beside a shared copy
        self.ours = self.start()
        self.num_pages = NUM_PAGES

    def start(self) -> WeightedRank:
        return WeightedRank(HostBackend(PAGE), self._folder, self._num_budget_pages).start()

    @rule(num_pages=st.integers(0, NUM_PAGES + 2))
    def hold(self, num_pages: int) -> None:
        status = self.ours.weights.hold(num_pages)
        wanted = min(num_pages, NUM_PAGES)
        if wanted >= self.num_pages:
            assert status.num_resident_pages == wanted
        else:  # what has changed may stay, and what lies in front of it
            assert wanted <= status.num_resident_pages <= self.num_pages
        self.num_pages = status.num_resident_pages

    @precondition(lambda self: self.num_pages)
    @rule(data=st.data(), value=st.integers(-3, 3))
    def change(self, data: st.DataObject, value: int) -> None:
        word = data.draw(st.integers(0, self.num_pages * WORDS - 1))
        self.ours.change(word, value)

    @precondition(lambda self: self.num_pages)
    @rule(data=st.data())
    def swap(self, data: st.DataObject) -> None:
        one, other = (data.draw(st.integers(0, self.num_pages * WORDS - 1)) for _ in range(2))
        first, second = int(self.ours.content[one]), int(self.ours.content[other])
        self.ours.change(one, second)
        self.ours.change(other, first)

    @rule()
    def mark_dirty(self) -> None:
        self.ours.weights.mark_dirty()

    @rule()
    def end_and_start(self) -> None:
        self.ours.close()
        self.ours = self.start()
        self.num_pages = NUM_PAGES

    @invariant()
    def is_right(self) -> None:
        self.ours.check(self.num_pages)

    def teardown(self) -> None:
        self.ours.close()
        shutil.rmtree(self._folder)


TestWeights = WeightsMachine.TestCase
TestWeights.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)
