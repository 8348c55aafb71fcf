"""Whatever is claimed, filled, used, left and killed: the budget holds, and what is used stays."""

import os
import shutil
import tempfile
from pathlib import Path
from threading import Event

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvcached_core.config import Config
from kvcached_core.errors import HostBudgetError
from kvcached_core.weights.copies_folder import read_holders
from kvcached_core.weights.host_budget import Claim, HostBudget
from kvcached_core.weights.host_file import SharedFile, open_shared
from kvcached_core.weights.key import CopyKey
from kvcached_core.weights.record import Shape

UNIT = 4096
BUDGET = 12 * UNIT
# Each model has a size of its own.
MODELS = {"a": 2, "b": 3, "c": 5, "d": 7}

models = st.sampled_from(sorted(MODELS))


class HostMemory(RuleBasedStateMachine):
    """Engines that have copies of their weights or claim memory, and the copies that are left."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kvcached-budget-"))
        self.budget = HostBudget(Config(weights_dir=self.folder, host_budget=BUDGET))
        self.claims: list[Claim] = []
        self.users: dict[str, list[SharedFile]] = {name: [] for name in MODELS}
        self.kept: list[str] = []  # without a user, oldest first

    def used_bytes(self) -> int:
        held = sum(MODELS[name] * UNIT for name, users in self.users.items() if users)
        return held + sum(claim.num_bytes for claim in self.claims)

    def make_room(self, num_bytes: int) -> bool:
        """Do in the model what a claim has to do; return whether it has to succeed."""
        if self.used_bytes() + num_bytes > BUDGET:
            return False
        while self.used_bytes() + self.kept_bytes() + num_bytes > BUDGET:
            self.kept.pop(0)
        return True

    def kept_bytes(self) -> int:
        return sum(MODELS[name] * UNIT for name in self.kept)

    @rule(num_units=st.integers(1, 8))
    def claim(self, num_units: int) -> None:
        num_bytes = num_units * UNIT
        has_room = self.make_room(num_bytes)
        try:
            self.claims.append(self.budget.claim("other", num_bytes))
        except HostBudgetError:
            assert not has_room
        else:
            assert has_room

    @rule(number=st.integers(0, 7))
    def give_back(self, number: int) -> None:
        if self.claims:
            self.claims.pop(number % len(self.claims)).close()

    @rule(name=models)
    def start(self, name: str) -> None:
        """An engine opens the copy of a model, and fills it if there is none."""
        file = open_shared(self.folder, Shape(CopyKey(name, name), UNIT, MODELS[name]), Event())
        assert file is not None
        if name in self.kept or self.users[name]:
            assert file.sums == [(1, 2)] * MODELS[name]
            self.kept = [other for other in self.kept if other != name]
            self.users[name].append(file)
            return
        assert file.sums is None
        has_room = self.make_room(MODELS[name] * UNIT)
        try:
            claim = self.budget.claim(name, MODELS[name] * UNIT, file=file.path.name)
        except HostBudgetError:
            assert not has_room
            file.close()
            return
        assert has_room
        file.allocate()
        file.publish([(1, 2)] * MODELS[name], [3] * MODELS[name])
        claim.close()
        self.users[name].append(file)

    @rule(name=models, is_killed=st.booleans())
    def end(self, name: str, *, is_killed: bool) -> None:
        """An engine ends, or is killed: then the kernel closes its files."""
        if not self.users[name]:
            return
        file = self.users[name].pop()
        if is_killed:
            file.disown()
            os.utime(file.path.with_suffix(".json"))  # the model has one order for both
        else:
            file.close()
        if not self.users[name]:
            self.kept.append(name)
            used_ns = {other: self.last_used_ns(other) for other in self.kept}
            assert used_ns[name] == max(used_ns.values())
            # Of one tick of the clock the first by name goes first.
            self.kept.sort(key=lambda other: (used_ns[other], other))

    def last_used_ns(self, name: str) -> int:
        return (self.folder / f"{name}.json").stat().st_mtime_ns

    @rule(name=models)
    def die_while_filling(self, name: str) -> None:
        if name not in self.kept and not self.users[name]:
            file = open_shared(self.folder, Shape(CopyKey(name, name), UNIT, MODELS[name]), Event())
            assert file is not None
            file.allocate()
            file.disown()

    @invariant()
    def what_is_held_is_what_the_model_says(self) -> None:
        holders = read_holders(self.folder)
        used = sum(holder.num_bytes for holder in holders if holder.is_used)
        assert used == self.used_bytes() <= BUDGET
        whole = {path.stem for path in self.folder.glob("*.json")}
        assert whole == {*self.kept, *(name for name, users in self.users.items() if users)}

    def teardown(self) -> None:
        for file in (file for users in self.users.values() for file in users):
            file.close()
        for claim in self.claims:
            claim.close()
        shutil.rmtree(self.folder)


HostMemory.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestHostMemory = HostMemory.TestCase
