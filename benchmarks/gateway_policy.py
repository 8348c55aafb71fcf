"""What the gateway's decisions of one tick take: 100 models, 16 devices, 1,000 requests that wait.

    python benchmarks/gateway_policy.py --json benchmarks/results/gateway_policy.json

A tick takes a reading of every model's counters and decides all that there is to decide: the order
of all that wait, a place for those without one and a move, whom to stop for one that does not fit,
and what to bring up. The values that go into a decision are made anew for each, and belong to its
time, and so do the reasons; requests wait as they came, and are not made anew. Every round is a
world of its own, drawn from its number. What it takes to look at the machine, and to act, is not in
it. On a machine that does other work, too, the processor's time says what a tick takes, and the
clock's what it had to wait besides.
"""

import gc
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any

from parts.machine import describe_machine
from parts.record import command_line, write

from kvcached_core.units import GIB, MIB
from kvcached_gateway.policy.admission import Pace, Waiting, order
from kvcached_gateway.policy.demand import Demand, weighted_rate
from kvcached_gateway.policy.eviction import Aging, Candidate, choose
from kvcached_gateway.policy.placement import DeviceRoom, PlacedModel, place
from kvcached_gateway.policy.prewarm import Habits, Prewarmable, wishes
from kvcached_gateway.settings.config import MemorySettings, PlacementSettings
from kvcached_gateway.settings.units import parse_warm_time

NUM_MODELS = 100
NUM_DEVICES = 16
NUM_WAITING = 1_000
NUM_HOMELESS = 20
NUM_ROUNDS = 300
TICK = "all of a tick"
NUM_FIRST = 20  # rounds that are not counted
NOW = 100_000.0
TIMES = (parse_warm_time("mon-fri 07:50 Europe/Berlin"),)
MOMENT = datetime(2026, 11, 30, 6, 50, tzinfo=UTC)
NAMES = [f"model-{index:03}" for index in range(NUM_MODELS)]
DEVICES = [f"GPU-{index:02}" for index in range(NUM_DEVICES)]


@dataclass
class World:
    """What a tick begins with: plain numbers, as they come from models and ledgers."""

    demands: dict[str, Demand]
    habits: Habits
    places: dict[str, tuple[str, ...]]
    weights_bytes: dict[str, int]
    rest: list[tuple[bool, bool, float, float]]
    lines: dict[str, list[Waiting]]


def make_world(number: int) -> World:
    """Draw a world whose every part has something to decide."""
    numbers = random.Random(number)
    demands = {name: Demand() for name in NAMES}
    habits = Habits()
    for index, (name, demand) in enumerate(demands.items()):
        demand.counted(0, 0, NOW - 60)
        for _ in range(numbers.randrange(40)):
            demand.arrived(NOW - numbers.random() * 600)
        demand.sent(50_000)
        demand.counted(numbers.random() * 60_000, 12_000, NOW - 0.5)
        demand.read(8_000, numbers.uniform(0.01, 0.2))
        for day in range(25):
            habits.arrived(name, day * 1_000.0 + index % 10)
    for name in NAMES[::3]:
        habits.arrived(name, NOW - 1)
    homeless = set(NAMES[:: NUM_MODELS // NUM_HOMELESS])
    return World(
        demands,
        habits,
        {name: () if name in homeless else (numbers.choice(DEVICES),) for name in NAMES},
        {name: numbers.randrange(1, 33) * GIB for name in NAMES},
        [
            (
                numbers.randrange(5) == 0,
                numbers.randrange(10) == 0,
                numbers.random() * 300,
                numbers.random() * 3_000,
            )
            for _ in NAMES
        ],
        make_lines(numbers),
    )


def make_lines(numbers: random.Random) -> dict[str, list[Waiting]]:
    """Draw what waits for each model: as it lies in the gateway's line, in the order of arrival."""
    arrivals = sorted(NOW - numbers.random() * 60 for _ in range(NUM_WAITING))
    lines: dict[str, list[Waiting]] = {name: [] for name in NAMES}
    for arrival in arrivals:
        name = numbers.choice(NAMES)
        deadline = None if numbers.randrange(5) == 0 else NOW + numbers.uniform(-1, 10)
        body_bytes = numbers.randrange(200, 40_000)
        lines[name].append(Waiting(name, arrival, deadline, body_bytes, arrival + 55.0))
    return lines


def count(world: World) -> None:
    """Take a reading of every model's counters."""
    for demand in world.demands.values():
        demand.counted(70_000, 15_000, NOW)


def admit(world: World) -> None:
    """Order all that wait as if for one set of devices, the most that there can be."""
    paces = {}
    for name, line in world.lines.items():
        speed = world.demands[name].reading_speed
        is_down = not world.places[name] and bool(line)
        paces[name] = Pace(speed, 30.0, line[0]) if is_down else Pace(speed)
    found = order(chain.from_iterable(world.lines.values()), NOW, paces)
    for one in found.late:
        found.reason(one)


def find_places(world: World) -> None:
    """Place those without a place, and find a move."""
    models = [
        PlacedModel(
            id=name,
            weighted_rate=weighted_rate(world.demands[name].tokens.per_second, 131_072, 0.05),
            weights_bytes=world.weights_bytes[name],
            residue_bytes=600 * MIB,
            floor_bytes=GIB,
            is_resident=index % 4 == 0,
            current=world.places[name],
        )
        for index, name in enumerate(NAMES)
    ]
    devices = [DeviceRoom(name, 140 * GIB, 2 * GIB) for name in DEVICES]
    place(models, devices, PlacementSettings(), NOW)


def find_victims(world: World) -> None:
    """Find whom to stop for one that lacks memory on two devices and in the host."""
    candidates = [
        Candidate(
            id=name,
            freed_bytes={**dict.fromkeys(places, 600 * MIB), "host": 20 * GIB},
            frequency=world.demands[name].frequency.at(NOW),
            start_seconds=30.0,
            is_busy=is_busy,
            is_pinned=is_pinned,
            idle_seconds=idle_seconds,
            warm_seconds=warm_seconds,
        )
        for (name, places), (is_busy, is_pinned, idle_seconds, warm_seconds) in zip(
            world.places.items(), world.rest, strict=True
        )
    ]
    needed_bytes = {DEVICES[0]: GIB, DEVICES[1]: GIB, "host": 120 * GIB}
    choose(candidates, needed_bytes, Aging(), MemorySettings(), NOW, is_for_request=True)


def find_wishes(world: World) -> None:
    """Find what to bring up: a part by the clock, a part by companions, a part by habit."""
    models = [
        Prewarmable(
            id=name,
            is_up=index % 3 == 0,
            is_yielded=index % 3 == 1,
            needed_bytes=dict.fromkeys(world.places[name], world.weights_bytes[name]),
            warm_at=TIMES if index % 5 == 0 else (),
            warm_with=(NAMES[index - 1],) if index % 5 == 1 else (),
            up_since=NOW - 100 if index % 3 == 0 else None,
        )
        for index, name in enumerate(NAMES)
    ]
    free_bytes = dict.fromkeys(DEVICES, 20 * GIB)
    wishes(NOW, MOMENT + timedelta(seconds=30), models, world.habits, free_bytes)


PARTS: dict[str, Callable[[World], None]] = {
    "readings": count,
    "admission": admit,
    "placement": find_places,
    "eviction": find_victims,
    "prewarming": find_wishes,
}


def measure() -> dict[str, dict[str, list[float]]]:
    """Return what each part of each tick took of the processor, and by the clock, in ms."""
    clocks = {"cpu_ms": time.thread_time_ns, "wall_ms": time.perf_counter_ns}
    times: dict[str, dict[str, list[float]]] = {
        clock: {name: [] for name in (*PARTS, TICK)} for clock in clocks
    }
    for number in range(NUM_FIRST + NUM_ROUNDS):
        world = make_world(number)
        gc.collect()  # what this benchmark leaves is no garbage of a tick
        begun = {clock: look() for clock, look in clocks.items()}
        before = begun
        for name, part in PARTS.items():
            part(world)
            after = {clock: look() for clock, look in clocks.items()}
            for clock in clocks:
                times[clock][name].append((after[clock] - before[clock]) / 1e6)
            before = after
        for clock in clocks:
            times[clock][TICK].append((before[clock] - begun[clock]) / 1e6)
    return {
        clock: {name: values[NUM_FIRST:] for name, values in parts.items()}
        for clock, parts in times.items()
    }


def summary(milliseconds: list[float]) -> dict[str, float]:
    """Return median and tails."""
    cuts = statistics.quantiles(milliseconds, n=100)
    return {"p50": cuts[49], "p99": cuts[98], "max": max(milliseconds)}


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = command_line(__doc__)
    path = arguments.parse_args().json
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "load_before": os.getloadavg()[0],
        "num_models": NUM_MODELS,
        "num_devices": NUM_DEVICES,
        "num_waiting": NUM_WAITING,
        "num_rounds": NUM_ROUNDS,
    }
    for clock, parts in measure().items():
        results[clock] = {name: summary(values) for name, values in parts.items()}
        for name, values in results[clock].items():
            row = "".join(f"{key} {value:8.2f}  " for key, value in values.items())
            print(f"{clock:8} {name:12}{row}")
    write(path, results)


if __name__ == "__main__":
    main()
