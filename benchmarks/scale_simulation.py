"""A SIMULATION of the gateway's policy over a large cluster for a day: no GPU, no engine.

    python benchmarks/scale_simulation.py --json benchmarks/results/scale_simulation.json

`kvcached_gateway.policy` decides for 10,000 models on 1,000 devices: placement over all of them,
eviction on each host, admission on each device. What engines do is simulated from times that our
records say, and from assumptions that the report lists. The requests are those of a chat arena's
log, which several hundred tenants play, stretched over a day that is busier at some hours. What
is real is what the decisions take, and what they decide.
"""

import json
import math
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace

from parts.machine import describe_machine
from parts.record import command_line, write
from scale.clock import Clock
from scale.cluster import Device, Model, Node
from scale.inputs import (
    DAY_SECONDS,
    HELD,
    STARTS,
    WAKE,
    Assumptions,
    Day,
    Measured,
    read_measured,
    weights_of,
)
from scale.serving import Serving
from scale.steering import Steering
from scale.tally import Tally

from kvcached_core.units import parse_bytes

DRAIN_SECONDS = 600.0  # how long answers of the day's last requests are waited for


def make_model(number: int, weights_bytes: int, measured: Measured, assumed: Assumptions) -> Model:
    """Return a model of this size: times grow with the weights, KV with their root."""
    scale = weights_bytes / measured.weights_bytes
    loading = max(weights_bytes - measured.weights_bytes, 0) / assumed.loading_bytes_per_second
    return Model(
        number,
        weights_bytes,
        token_bytes=int(assumed.token_bytes * math.sqrt(scale)),
        prompt_seconds=scale / assumed.prompt_tokens_per_second,
        start_seconds=measured.start_seconds + loading,
        wake_seconds=measured.wake_seconds * scale,
    )


@dataclass(frozen=True)
class World:
    """What is left of a simulated day."""

    models: list[Model]
    devices: list[Device]
    tally: Tally


def simulate(
    num_models: int,
    num_devices: int,
    assumed: Assumptions,
    *,
    seed: int,
    seconds: float = DAY_SECONDS,
    drain_seconds: float = DRAIN_SECONDS,
) -> World:
    """Let a day pass, or the first `seconds` of it, and what was asked in them be answered."""
    numbers = random.Random(seed)
    measured = read_measured()
    weights = weights_of(num_models, assumed, numbers)
    models = [
        make_model(number, weights_bytes, measured, assumed)
        for number, weights_bytes in enumerate(weights)
    ]
    nodes = [
        Node(index, assumed.host_bytes)
        for index in range(-(-num_devices // assumed.devices_per_node))
    ]
    devices = [
        Device(f"{index:04}", nodes[index // assumed.devices_per_node], measured.device_bytes)
        for index in range(num_devices)
    ]
    day = Day(num_models, assumed, numbers)
    clock, tally = Clock(), Tally()
    serving = Serving(models, clock, tally, assumed, measured.awake_seconds)
    steering = Steering(models, devices, measured, serving)
    steering.begin(day.tokens_per_second())
    for request in day.requests():
        if request.at > seconds:
            break
        while clock.next_at <= request.at:
            clock.step()
        clock.now = request.at
        tally.count("requests", request.at)
        model = models[request.model]
        model.demand.arrived(request.at)
        model.last_used = request.at
        model.num_requests += 1
        serving.ask(model, request)
        if model.device is None:
            steering.want(model)
    while clock.next_at <= seconds + drain_seconds:
        clock.step()
    return World(models, devices, tally)


def report(
    num_models: int, num_devices: int, host: str, seed: int, seconds: float
) -> dict[str, object]:
    """Simulate hosts of this size; return what to write down of it."""
    begun = time.monotonic()
    assumed = replace(Assumptions(), host_bytes=parse_bytes(host, what="--host"))
    world = simulate(num_models, num_devices, assumed, seed=seed, seconds=seconds)
    return world.tally.report() | {"took_seconds": time.monotonic() - begun}


def main() -> None:
    """Simulate, write JSON, print the main figures."""
    arguments = command_line(__doc__)
    arguments.add_argument("--models", type=int, default=10_000)
    arguments.add_argument("--devices", type=int, default=1_000)
    arguments.add_argument("--host", nargs="+", default=["1TiB"], help="memory of a host")
    arguments.add_argument("--hours", type=float, default=24.0)
    arguments.add_argument("--seed", type=int, default=20_261_129)
    given = arguments.parse_args()
    seconds = min(given.hours * 3_600, DAY_SECONDS)
    with ProcessPoolExecutor() as pool:  # a day each
        days = {
            host: pool.submit(report, given.models, given.devices, host, given.seed, seconds)
            for host in given.host
        }
    cases = {host: day.result() for host, day in days.items()}
    for host, case in cases.items():
        shown = ("total", "attainment", "moves_per_hour", "ttft_seconds", "decision_ms")
        print(host, json.dumps({name: case[name] for name in shown}, indent=2))
    results = {
        "simulated": True,
        "machine": describe_machine(),
        "inputs": {
            "models": given.models,
            "devices": given.devices,
            "hours": given.hours,
            "seed": given.seed,
            "log": "multi_model/data/arena_multimodel_trace.csv.gz",
            "records": [WAKE, HELD, STARTS],
            "measured": asdict(read_measured()),
            "assumed": {
                name: value for name, value in asdict(Assumptions()).items() if name != "host_bytes"
            },
        },
        "cases": cases,
    }
    write(given.json, results)


if __name__ == "__main__":
    main()
