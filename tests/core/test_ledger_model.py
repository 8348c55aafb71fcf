"""The ledger against a model in plain Python: eight processes, random operations, kill -9."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from helpers import ledger_child
from helpers.ledger_child import OPERATIONS, PAGE, WITH_WEIGHTS

from kvcached_core.errors import PolicyError
from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.ledger.policy import Policy
from kvcached_core.ledger.view import DeviceView

CAPACITY = 100
NUM_PROCESSES = 8
NUM_STEPS, NUM_STEPS_OF_A_RELEASE = 1_500, 14_000
NUM_STEPS_OF_A_LIFE = 100
NUM_STORM = 1_000
NONE = 10**9


@dataclass
class Model:
    """What one instance should have, in pages."""

    promised: int = 0
    resident: int = 0
    asked: int = 0
    limit: int = NONE
    floor: int = 0
    used: int = 0
    weights: int = 0
    announced: int = 0
    waking: int = 0

    @property
    def held(self) -> int:
        return self.promised + self.resident

    @property
    def unmet(self) -> int:
        return max(self.floor - self.held, 0)

    @property
    def excess(self) -> int:
        return max(self.held - self.limit, 0)


class Process:
    """A child and its model."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.model = Model()
        command = [sys.executable, ledger_child.__file__, str(path), str(CAPACITY * PAGE), name]
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.row = RowKey(*self.receive())

    def send(self, operation: str, num: int) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps([operation, num]) + "\n")
        self.child.stdin.flush()

    def receive(self) -> Any:
        assert self.child.stdout is not None
        return json.loads(self.child.stdout.readline())

    def do(self, operation: str, num: int) -> Any:
        self.send(operation, num)
        return self.receive()

    def kill(self) -> None:
        self.child.kill()
        self.child.communicate()


@dataclass
class World:
    """Eight processes on one ledger, and what should be true of them."""

    path: Path
    ledger: Ledger
    source: random.Random
    names: Iterator[int] = field(default_factory=count)
    wakes: Iterator[int] = field(default_factory=lambda: count(1))
    processes: list[Process] = field(default_factory=list)

    def start(self) -> None:
        self.processes.append(Process(self.path, f"p{next(self.names)}"))

    def kill_one(self, *, in_flight: bool) -> None:
        victim = self.source.choice(self.processes)
        if in_flight:
            victim.send(self.source.choice(OPERATIONS), self.source.randrange(1, 30))
            time.sleep(self.source.random() * 3e-4)
        victim.kill()
        self.processes.remove(victim)

    def expected_grant(self, process: Process, num: int, *, may_borrow: bool) -> int:
        mine = process.model
        others = [other.model for other in self.processes if other is not process]
        free = CAPACITY - sum(one.held + one.weights + one.announced for one in (*others, mine))
        if not may_borrow:
            free -= sum(other.unmet for other in others)
        return max(min(num, free, mine.limit - mine.held), 0)

    def may_restore(self, process: Process) -> bool:
        """Return whether it is the first that wakes, and all that it announced is free."""
        mine = process.model
        others = [other.model for other in self.processes if other is not process]
        wakers = [other for other in others if other.waking]
        if not mine.waking or any(other.waking < mine.waking for other in wakers):
            return False
        free = CAPACITY - sum(one.held + one.weights for one in (*others, mine))
        return mine.announced <= free - sum(other.unmet for other in others)

    def step(self) -> None:
        process = self.source.choice(self.processes)
        mine, num = process.model, self.source.randrange(1, 30)
        operation = self.source.choice((*OPERATIONS, "limit", "floor", "trim"))
        if operation in ("limit", "floor"):
            self.set_policy(process, operation, num)
        elif operation == "trim":
            self.ledger.ask(process.row, num * PAGE)
            mine.asked = max(mine.asked, min(num, mine.resident - mine.used))
        else:
            model = self.expected_of_weights if operation in WITH_WEIGHTS else self.expected
            expected = model(process, operation, num)
            assert process.do(operation, num) == expected, (process.name, operation, num, mine)
        self.check(self.ledger.view())

    def expected(self, process: Process, operation: str, num: int) -> int:
        mine = process.model
        if operation in ("promise", "borrow"):
            granted = self.expected_grant(process, num, may_borrow=operation == "borrow")
            mine.promised += granted
            return granted
        if operation in ("map", "cancel"):
            done = min(num, mine.promised)
            mine.promised -= done
            mine.resident += done if operation == "map" else 0
            return done
        if operation == "use":
            mine.used = min(num, mine.resident)
            return mine.used
        if operation == "answer":
            num, mine.asked = max(mine.asked, mine.excess), 0
        done = min(num, mine.resident)
        mine.resident -= done
        mine.used = min(mine.used, mine.resident)
        return done

    def expected_of_weights(self, process: Process, operation: str, num: int) -> int:
        mine = process.model
        if operation == "wake":
            done = 0 if mine.announced else num
            mine.announced += done
            mine.waking = next(self.wakes) if done else mine.waking
        elif operation == "restore":
            done = min(num, mine.announced) if self.may_restore(process) else 0
            mine.announced -= done
            mine.weights += done
            mine.waking = mine.waking if mine.announced else 0
        elif operation == "drop":
            done = 0 if mine.announced else min(num, mine.weights)
            mine.weights -= done
        else:
            done, mine.announced, mine.waking = mine.announced, 0, 0
        return done

    def set_policy(self, process: Process, what: str, num: int) -> None:
        mine = process.model
        limit, floor = mine.limit, mine.floor
        if what == "limit":
            limit = NONE if num > 20 else num * 3
        else:
            floor = num - 10 if num > 10 else 0
        floors = floor + sum(p.model.floor for p in self.processes if p is not process)
        policy = Policy(None if limit == NONE else limit * PAGE, floor * PAGE)
        try:
            self.ledger.change_policy(process.row, **vars(policy))
        except PolicyError:
            assert floor > limit or (floor and floors > CAPACITY), policy
        else:
            assert floor <= limit, policy
            assert not floor or floors <= CAPACITY, policy
            mine.limit, mine.floor = limit, floor

    def check(self, view: DeviceView) -> None:
        assert view.free_bytes >= 0
        seen = {row.name: row for row in view.instances}
        assert set(seen) == {process.name for process in self.processes}
        for process in self.processes:
            row, mine = seen[process.name], process.model
            assert (row.promised_bytes, row.resident_bytes) == (
                mine.promised * PAGE,
                (mine.resident + mine.weights) * PAGE,
            )
            assert (row.weights_bytes, row.static_bytes) == (
                mine.weights * PAGE,
                mine.announced * PAGE,
            )
            assert (row.asked_bytes, row.is_waking) == (mine.asked * PAGE, bool(mine.waking))
            held = row.used_bytes + row.cached_bytes + row.idle_bytes
            assert row.resident_bytes == held + row.weights_bytes
            taken = self.ledger._row(process.row).taken_bytes
            assert taken == row.resident_bytes + row.promised_bytes + row.static_bytes


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    path = ledger_directory(tmp_path / "kv") / "host.ledger"
    with Ledger(path, CAPACITY * PAGE) as ledger:
        made = World(path, ledger, random.Random(7))
        try:
            for _ in range(NUM_PROCESSES):
                made.start()
            yield made
        finally:
            for process in made.processes:
                process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_steps",
    [NUM_STEPS, pytest.param(NUM_STEPS_OF_A_RELEASE, marks=pytest.mark.every_release)],
)
def test_the_ledger_is_the_models_whatever_is_done_and_whoever_is_killed(
    world: World, num_steps: int
) -> None:
    for number in range(1, 1 + num_steps):
        if number % NUM_STEPS_OF_A_LIFE == 0:
            world.kill_one(in_flight=number % (2 * NUM_STEPS_OF_A_LIFE) == 0)
            world.check(world.ledger.view())  # all bytes of the dead are back
            world.start()
        world.step()


@pytest.mark.slow
def test_a_storm_of_eight_never_promises_too_much(world: World) -> None:
    for process in world.processes:
        process.send("storm", NUM_STORM)
    for victim in world.processes[:2]:
        for _ in range(20):
            assert world.ledger.view().free_bytes >= 0
        victim.kill()
    survivors = world.processes[2:]
    for process in survivors:
        process.receive()
    views = world.ledger.view()
    assert {row.name for row in views.instances} == {process.name for process in survivors}
    assert views.free_bytes >= 0
    for process in survivors:
        process.do("cancel", NONE)
        process.do("free", NONE)
        process.do("give_up", 0)
        process.do("drop", NONE)
    assert world.ledger.view().free_bytes == CAPACITY * PAGE
