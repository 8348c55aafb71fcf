"""Whoever starts, reads, offers, ends and is killed: an image is whole in memory or on disk."""

import ctypes
import os
import shutil
import tempfile
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from helpers.weight_pages import PAGE_BYTES, PagedLayout, Pages, Pins
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcached_core.config import Config
from kvcached_core.errors import HostBudgetError
from kvcached_core.units import GIB
from kvcached_core.weights.budgets import make_budget
from kvcached_core.weights.copies_folder import read_holders
from kvcached_core.weights.host_copy import HostCopy
from kvcached_core.weights.key import CopyKey
from kvcached_core.weights.moving_out import MovingOut
from kvcached_core.weights.open_copy import open_copy

if TYPE_CHECKING:
    from kvcached_core.weights.host_budget import Claim

LAYOUT = PagedLayout(num_pages=2)
WHOLE_BYTES = LAYOUT.num_pages * PAGE_BYTES
NUM_MODELS, NUM_ROOMS = 5, 2

models = st.integers(0, NUM_MODELS - 1)


def key_of(number: int) -> CopyKey:
    return CopyKey(str(number) * 32, f"model-{number}")


class Engine:
    """One engine with a copy, as far as that goes: it reads it, or lets others have it."""

    def __init__(self, number: int, config: Config) -> None:
        self.number, self.config = number, config
        self.copy: HostCopy | None = None
        self.moving, self.is_offered = MovingOut(self, self.open, Pins()), False

    def open(self, stop: Event) -> HostCopy | None:
        budget = make_budget(self.config, GIB)
        return open_copy(self.config, key_of(self.number), LAYOUT, budget, stop=stop)


class Images(RuleBasedStateMachine):
    """Five models, host memory for the copies of two, and a disk for all."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kv-disk-"))
        self.config = Config(
            weights_dir=self.folder / "memory",
            weights_disk=self.folder / "disk",
            weights_disk_free=0,
            host_budget=NUM_ROOMS * WHOLE_BYTES,
        )
        self.engines: dict[int, Engine] = {}
        self.filled: set[int] = set()  # whose image is whole somewhere
        self.claims: list[Claim] = []

    def num_reading(self) -> int:
        return sum(not engine.is_offered for engine in self.engines.values())

    def has_room(self) -> bool:
        return self.num_reading() + len(self.claims) < NUM_ROOMS

    @rule(number=models)
    def start(self, number: int) -> None:
        """An engine starts: its copy is there if it ever was, and there is room for it."""
        if number in self.engines:
            return
        engine, has_room = Engine(number, self.config), self.has_room()
        engine.copy = engine.open(Event())
        assert (engine.copy is not None) == has_room
        if engine.copy is None:
            return
        assert engine.copy.is_complete == (number in self.filled)
        if not engine.copy.is_complete:
            assert engine.copy.fill(Pages.of(number, LAYOUT.num_pages), Event())
        self.check(engine)
        self.filled.add(number)
        self.engines[number] = engine

    @rule(number=models)
    def offer(self, number: int) -> None:
        engine = self.engines.get(number)
        if engine is not None and not engine.is_offered and engine.copy is not None:
            engine.moving.offer()
            engine.is_offered = True

    @rule(number=models)
    def read(self, number: int) -> None:
        engine = self.engines.get(number)
        if engine is None or not engine.is_offered or engine.copy is None:
            return
        has_room = self.has_room()
        found = engine.moving.back()
        if found is None:
            assert not has_room
            return
        engine.is_offered = False
        self.check(engine)

    @rule(number=models)
    def end(self, number: int) -> None:
        engine = self.engines.pop(number, None)
        if engine is not None and engine.copy is not None:
            engine.moving.close()
            engine.copy.close()

    @rule()
    def claim(self) -> None:
        has_room = self.has_room()
        try:
            self.claims.append(make_budget(self.config, GIB).claim("other", WHOLE_BYTES))
        except HostBudgetError:
            assert not has_room
        else:
            assert has_room

    @precondition(lambda self: self.claims)
    @rule()
    def give_back(self) -> None:
        self.claims.pop().close()

    @rule(call=st.sampled_from(["pwritev", "fsync"]), number=st.integers(1, 4))
    def die_while_an_image_goes(self, call: str, number: int) -> None:
        """A claimant is killed: the kernel closes its files, and nothing is cleaned up."""
        pid = os.fork()
        if pid == 0:
            self.die_at(call, number)
        os.waitpid(pid, 0)

    def die_at(self, call: str, number: int) -> None:
        before, calls = getattr(os, call), [0]

        def act(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                os._exit(1)
            return before(*args)

        try:
            setattr(os, call, act)
            make_budget(self.config, GIB).claim("other", WHOLE_BYTES)
        finally:
            os._exit(0)

    def check(self, engine: Engine) -> None:
        assert engine.copy is not None
        expected = Pages.of(engine.number, LAYOUT.num_pages)
        assert engine.copy.sums == expected.sums(0, LAYOUT.num_pages)
        for page, content in enumerate(expected.content):
            assert ctypes.string_at(engine.copy.page_address(page), PAGE_BYTES) == content

    @invariant()
    def no_image_is_lost_and_the_budget_holds(self) -> None:
        memory, disk = self.config.copies_dir, self.folder / "disk"
        held = sum(holder.num_bytes for holder in read_holders(memory))
        assert held <= NUM_ROOMS * WHOLE_BYTES
        whole = {int(path.stem[0]) for place in (memory, disk) for path in place.glob("*.json")}
        assert whole == self.filled
        for engine in self.engines.values():
            if not engine.is_offered:
                self.check(engine)

    def teardown(self) -> None:
        for number in list(self.engines):
            self.end(number)
        for claim in self.claims:
            claim.close()
        shutil.rmtree(self.folder)


Images.TestCase.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
TestImages = Images.TestCase
