"""What a simulated cluster is made of: sizes from our records, requests from a real log.

What no record says is in `Assumptions`, and nowhere else.
"""

import heapq
import json
import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from multi_model.traces import TraceRequest, read_arena

from kvcached_core.units import GIB

RESULTS = Path(__file__).resolve().parents[1] / "results"
WAKE = "gpu/weights_wake_h200.json"
HELD = "gpu/weights_giving_h200.json"
STARTS = "gpu/new_engines_h200.json"
DAY_SECONDS = 86_400.0


@dataclass(frozen=True)
class Assumptions:
    """Everything that is neither in a record nor in the log.

    Attributes:
        devices_per_node: GPUs that share one host's memory.
        host_bytes: What engines and copies may have of it.
        weights_gib: The sizes of models, and how many of a hundred have each.
        process_bytes: What an engine's process holds of the host beside its copy.
        loading_bytes_per_second: How fast weights beyond those of the record are read at a start.
        prompt_tokens_per_second: How fast a model of the record's size reads; others by their size.
        tpot_seconds: How fast every model answers.
        token_bytes: KV of one token for the record's model; others by the root of their size.
        ttft_seconds: The goal of every request.
        mean_plays: How often a tenant's log is played on a day, on average.
        day_swing: By how much the busiest moment of a day is above its mean, and the calmest below.
        place_seconds: How often those that wait for a place are placed.
        look_seconds: How often it is looked for a move.
    """

    devices_per_node: int = 8
    host_bytes: int = 1_024 * GIB
    weights_gib: dict[int, int] = field(
        default_factory=lambda: {2: 15, 6: 15, 15: 45, 28: 15, 62: 10}
    )
    process_bytes: int = 3 * GIB
    loading_bytes_per_second: int = 2 * GIB
    prompt_tokens_per_second: float = 20_000.0
    tpot_seconds: float = 0.02
    token_bytes: int = 128 * 1024
    ttft_seconds: float = 2.0
    mean_plays: float = 3.0
    day_swing: float = 0.8
    place_seconds: float = 30.0
    look_seconds: float = 60.0


@dataclass(frozen=True)
class Measured:
    """What our records say, of an 8B model on one H200.

    Attributes:
        device_bytes: What the engines had of the device together.
        weights_bytes: Its weights.
        residue_bytes: What its engine holds of the device while they are away.
        wake_seconds: What a request's first token takes more where the weights are away.
        awake_seconds: From a request to its first token while they are there.
        start_seconds: From the command until it serves.
    """

    device_bytes: int
    weights_bytes: int
    residue_bytes: int
    wake_seconds: float
    awake_seconds: float
    start_seconds: float


class Request(NamedTuple):
    """A request: when it comes, which model it asks, how long prompt and answer are."""

    at: float
    model: int
    num_in: int
    num_out: int


def read_measured() -> Measured:
    """Return what the records say."""
    wake = json.loads((RESULTS / WAKE).read_text())
    start = json.loads((RESULTS / STARTS).read_text())
    elastic = start["vllm"]["cases"]["8B-V2-graphs-caching-on"]["elastic"]
    awake_seconds = statistics.median(wake["free"]["awake_seconds"])
    return Measured(
        device_bytes=elastic["view"]["capacity_bytes"],
        weights_bytes=wake["held"]["weights_bytes"]["first"],
        residue_bytes=int(json.loads((RESULTS / HELD).read_text())["held"]["held_bytes_each"]),
        wake_seconds=statistics.median(wake["free"]["seconds"]) - awake_seconds,
        awake_seconds=awake_seconds,
        start_seconds=elastic["ready_seconds"],
    )


def weights_of(num_models: int, assumed: Assumptions, numbers: random.Random) -> list[int]:
    """Draw the sizes of the models' weights, in bytes."""
    sizes, shares = list(assumed.weights_gib), list(assumed.weights_gib.values())
    return [size * GIB for size in numbers.choices(sizes, shares, k=num_models)]


@dataclass(frozen=True)
class Tenant:
    """One who asks 27 models of its own as the log's users asked theirs.

    Attributes:
        first_model: The number of its first model.
        num_plays: How often the log is played in a day, stretched so that it fills the day.
        begins_at: Where in the log it begins, as a share of it.
        peak_seconds: When its day is busiest.
    """

    first_model: int
    num_plays: float
    begins_at: float
    peak_seconds: float


class Day:
    """A day of requests: each tenant plays the real log, slowly, and slower by night."""

    def __init__(self, num_models: int, assumed: Assumptions, numbers: random.Random) -> None:
        self.log = read_arena()
        names = sorted({request.model for request in self.log})
        self._number = {name: index for index, name in enumerate(names)}
        self._swing = assumed.day_swing
        self.num_models = num_models
        self.tenants = []
        for first_model in range(0, num_models, len(names)):
            num_plays = numbers.paretovariate(1.5) / 3.0 * assumed.mean_plays
            peak = (numbers.choice([6, 14, 22]) + numbers.random()) * 3_600
            self.tenants.append(Tenant(first_model, min(num_plays, 60.0), numbers.random(), peak))

    def requests(self) -> Iterator[Request]:
        """Yield a day's requests by time."""
        return heapq.merge(*(self._played(tenant) for tenant in self.tenants))

    def tokens_per_second(self) -> list[float]:
        """Return what each model computes, as a mean over the day."""
        tokens = [0.0] * self.num_models
        for tenant in self.tenants:
            for request in self.log:
                model = tenant.first_model + self._number[request.model]
                if model < self.num_models:
                    count = (request.num_in + request.num_out) * tenant.num_plays
                    tokens[model] += count / DAY_SECONDS
        return tokens

    def _played(self, tenant: Tenant) -> Iterator[Request]:
        log = self.log
        span = log[-1].at_seconds * (1 + 1 / len(log))
        position = int(tenant.begins_at * len(log))
        before = log[position].at_seconds
        num_rounds = 0
        while True:
            one: TraceRequest = log[position]
            played = (num_rounds * span + one.at_seconds - before) / span
            at = self._moment(played / tenant.num_plays, tenant.peak_seconds)
            if at >= DAY_SECONDS:
                return
            model = tenant.first_model + self._number[one.model]
            if model < self.num_models:
                yield Request(at, model, one.num_in, one.num_out)
            position += 1
            if position == len(log):
                position, num_rounds = 0, num_rounds + 1

    def _moment(self, share: float, peak_seconds: float) -> float:
        """Return when this share of a day's requests has come; a cosine around the peak."""
        turn = 2 * math.pi
        phase = peak_seconds / DAY_SECONDS
        start = math.sin(-turn * phase)
        moment = share
        for _ in range(8):  # Newton's steps
            grown = moment + self._swing / turn * (math.sin(turn * (moment - phase)) - start)
            slope = 1 + self._swing * math.cos(turn * (moment - phase))
            moment -= (grown - share) / slope
        return moment * DAY_SECONDS
