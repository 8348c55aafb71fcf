"""Engines that start at once on a device too small for all their weights: all of them start."""

import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.starter import NUM_WEIGHTS, Stage, Starter
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcached_core.ledger.opening import ledger_directory

MOST_ROUNDS = 400


class House:
    """Engines on one device; each round all of them go on by a step, in any order."""

    def __init__(self, folder: Path, num_pages: int, seed: int) -> None:
        self.path = ledger_directory(folder) / "host.ledger"
        self.num_pages = num_pages
        self.starters: list[Starter] = []
        self.num_rounds = 0
        self._random = random.Random(seed)

    def start(self, *, has_two_rows: bool = True, priority: int = 0) -> Starter:
        started = Starter(
            self.path,
            self.num_pages,
            f"engine-{len(self.starters)}",
            lambda: self.num_rounds,
            has_two_rows=has_two_rows,
            priority=priority,
        )
        self.starters.append(started)
        return started

    def go_round(self) -> None:
        self.num_rounds += 1
        for each in self._random.sample(self.starters, len(self.starters)):
            if each.stage is not Stage.FAILED:
                each.step()

    def go_on(self) -> None:
        """Go on until all starts are over."""
        while not all(each.has_ended for each in self.starters):
            assert self.num_rounds < MOST_ROUNDS, [each.stage for each in self.starters]
            self.go_round()

    def stages(self) -> list[Stage]:
        return [each.stage for each in self.starters]

    def close(self) -> None:
        for each in self.starters:
            each.ledger.close()


@contextmanager
def house(num_pages: int, seed: int = 0) -> Iterator[House]:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    made = House(folder, num_pages, seed)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder)


KINDS = st.lists(st.booleans(), min_size=2, max_size=5)
SEEDS = st.integers(0, 1 << 16)


@settings(deadline=None)
@given(KINDS, st.integers(0, 3 * NUM_WEIGHTS), SEEDS)
def test_all_start_where_the_weights_of_one_fit_and_a_page_of_each(
    kinds: list[bool], num_more: int, seed: int
) -> None:
    with house(NUM_WEIGHTS + len(kinds) + num_more, seed) as made:
        for has_two_rows in kinds:
            made.start(has_two_rows=has_two_rows)
        made.go_on()
        assert set(made.stages()) == {Stage.READY}
        device = made.starters[0].ledger.view()
        assert sum(view.resident_bytes for view in device.instances) <= device.capacity_bytes


@settings(deadline=None)
@given(KINDS, st.integers(0, 3 * NUM_WEIGHTS), SEEDS)
def test_where_there_is_less_each_ends_and_nobody_waits_for_ever(
    kinds: list[bool], num_pages: int, seed: int
) -> None:
    with house(max(num_pages, 1), seed) as made:
        for has_two_rows in kinds:
            made.start(has_two_rows=has_two_rows)
        made.go_on()
        assert (Stage.READY in made.stages()) == (num_pages > NUM_WEIGHTS)


@settings(deadline=None)
@given(KINDS, st.integers(0, 30), SEEDS)
def test_one_that_is_killed_at_any_moment_holds_nobody_up(
    kinds: list[bool], num_rounds: int, seed: int
) -> None:
    with house(NUM_WEIGHTS + len(kinds), seed) as made:
        for has_two_rows in kinds:
            made.start(has_two_rows=has_two_rows)
        for _ in range(num_rounds):
            made.go_round()
        made.starters[seed % len(kinds)].kill()
        made.go_on()
        assert made.stages().count(Stage.READY) == len(kinds) - 1
