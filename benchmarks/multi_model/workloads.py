"""What is asked of the models and when: schedules of requests, from formulas and from traces."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from multi_model.traces import TraceRequest


@dataclass(frozen=True)
class Request:
    """One request of a schedule.

    Attributes:
        at_seconds: When it comes, from the schedule's start.
        model: Which model it asks.
        num_in: Tokens of its prompt.
        num_out: Tokens of its answer.
        conversation: Whose prompts begin alike, or nothing where this prompt is its own.
        turn: How many requests of its conversation came before it.
    """

    at_seconds: float
    model: int
    num_in: int
    num_out: int
    conversation: str = ""
    turn: int = 0


@dataclass(frozen=True)
class Workload:
    """A named schedule, in the order of arrival."""

    name: str
    num_models: int
    requests: tuple[Request, ...]

    @property
    def seconds(self) -> float:
        """When the last request comes."""
        return self.requests[-1].at_seconds if self.requests else 0.0

    def of_model(self, model: int) -> "Workload":
        """Return what is asked of one model alone, at the same times."""
        own = tuple(request for request in self.requests if request.model == model)
        return replace(self, requests=own)

    def fitting(self, max_tokens: int) -> "Workload":
        """Return the same with prompts cut where a request would be longer than a model takes."""
        fitted = tuple(
            replace(request, num_in=max(min(request.num_in, max_tokens - request.num_out), 1))
            for request in self.requests
        )
        return replace(self, requests=fitted)

    def shares(self) -> list[float]:
        """Return each model's part of the KV memory that the schedule needs on average.

        A request holds its prompt and half its answer for about as long as its answer is long.
        """
        needs = [0.0] * self.num_models
        for request in self.requests:
            needs[request.model] += (request.num_in + request.num_out / 2) * request.num_out
        return [need / sum(needs) for need in needs]


def ramp(peak: int, *, num_models: int = 3, num_in: int = 256, num_out: int = 256) -> Workload:
    """Each model's rate climbs to `peak` requests a second and back, one more or less a second.

    A model begins a quarter of `peak` seconds after the one before it is done, so the peaks never
    meet. `peak` squared requests go to each.
    """
    apart = 2 * peak + peak / 4
    return _ramps("ramp", peak, [model * apart for model in range(num_models)], num_in, num_out)


def ramp_together(
    peak: int, *, num_models: int = 3, num_in: int = 256, num_out: int = 2048
) -> Workload:
    """The same, with all peaks at the same moment: the worst case for shared memory."""
    return _ramps("ramp-together", peak, [0.0] * num_models, num_in, num_out)


def constant(
    rate: float, seconds: float, *, num_models: int = 3, num_in: int = 256, num_out: int = 256
) -> Workload:
    """Every model is asked at the same steady rate: nothing is to be gained from sharing."""
    every = 1 / rate
    requests = [
        Request(number * every + model * every / num_models, model, num_in, num_out)
        for model in range(num_models)
        for number in range(int(rate * seconds))
    ]
    return ordered(f"constant {rate:g}/s", num_models, requests)


def arena(
    trace: Sequence[TraceRequest], *, num_models: int, speed: float, seconds: float | None = None
) -> Workload:
    """A log of many models, folded on fewer ones by rank, `speed` times as fast.

    Args:
        trace: The log.
        num_models: The busiest model of the log goes to model 0, the next to 1, and around again.
        speed: How many seconds of the log pass in one.
        seconds: How much of it is replayed, in seconds of the replay; None takes all.
    """
    counts = Counter(entry.model for entry in trace)
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    model_of = {name: rank % num_models for rank, name in enumerate(ranked)}
    requests = [
        Request(entry.at_seconds / speed, model_of[entry.model], entry.num_in, entry.num_out)
        for entry in trace
        if seconds is None or entry.at_seconds / speed < seconds
    ]
    return ordered(f"arena x{speed:g}", num_models, requests)


def azure(
    trace: Sequence[TraceRequest], *, seconds: float, beside_rate: float, num_models: int = 3
) -> Workload:
    """One model gets a service's real arrivals, the others a steady load beside it."""
    real = [
        Request(entry.at_seconds, 0, entry.num_in, entry.num_out)
        for entry in trace
        if entry.at_seconds < seconds
    ]
    steady = constant(beside_rate, seconds, num_models=num_models).requests
    beside = [request for request in steady if request.model]
    return ordered(f"azure beside {beside_rate:g}/s", num_models, real + beside)


def _ramps(name: str, peak: int, starts: Sequence[float], num_in: int, num_out: int) -> Workload:
    rates = [*range(1, peak), *range(peak, 0, -1)]
    requests = [
        Request(start + second + number / rate, model, num_in, num_out)
        for model, start in enumerate(starts)
        for second, rate in enumerate(rates)
        for number in range(rate)
    ]
    return ordered(f"{name} P={peak}", len(starts), requests)


def ordered(name: str, num_models: int, requests: Iterable[Request]) -> Workload:
    """Return a workload of requests, in the order of arrival."""
    found = sorted(requests, key=lambda request: (request.at_seconds, request.model))
    return Workload(name, num_models, tuple(found))
