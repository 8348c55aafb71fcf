"""Schedules for more models than a device holds: seeded draws, with lengths out of logs."""

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise

from multi_model.popularity import counts_by_rank, fitted_exponent, shares
from multi_model.traces import TraceRequest
from multi_model.workloads import Request, Workload, ordered

# A burst: so many requests to one model on average, and so long from one to the next.
BURST_REQUESTS = 5.0
BURST_GAP_SECONDS = 0.2
# How often a model is asked that is asked now and then.
SELDOM_SECONDS = (6.0, 60.0)


def many(
    trace: Sequence[TraceRequest],
    *,
    num_models: int,
    rate: float,
    seconds: float,
    seed: int = 0,
) -> Workload:
    """Return bursts to many models, which are as unevenly popular as a log's.

    A burst asks one model, drawn by Zipf's law with the exponent fitted to the log; it has a
    geometric number of requests. Lengths are those of the log's requests, drawn one by one.

    Args:
        trace: The log: popularity and lengths come from it.
        num_models: How many models there are; the first is the busiest.
        rate: Requests a second to all of them together, on average.
        seconds: How long bursts begin.
        seed: Of the draws; the same seed gives the same schedule.
    """
    draws = random.Random(seed)
    popularity = shares(num_models, fitted_exponent(counts_by_rank(trace)))
    requests = []
    for begin in _arrivals(draws, rate / BURST_REQUESTS, seconds):
        (model,) = draws.choices(range(num_models), popularity)
        at_seconds = begin
        while True:
            lengths = draws.choice(trace)
            requests.append(Request(at_seconds, model, lengths.num_in, lengths.num_out))
            if draws.random() < 1 / BURST_REQUESTS:
                break
            at_seconds += draws.expovariate(1 / BURST_GAP_SECONDS)
    return ordered(f"many {rate:g}/s", num_models, requests)


def serverless(
    trace: Sequence[TraceRequest],
    *,
    num_models: int,
    speed: float,
    seconds: float,
    seed: int = 0,
) -> Workload:
    """Return requests to models that are each asked now and then, one request at a time.

    The models' mean gaps go from 6 to 60 s in even steps of their logarithm; each gap is drawn
    from an exponential distribution. Nothing is known of one model's next request from another's.

    Args:
        trace: The log that lengths are drawn from.
        num_models: How many models there are; the first is asked most often.
        speed: How many times as often as that they are asked.
        seconds: How long requests come.
        seed: Of the draws.
    """
    low, high = SELDOM_SECONDS
    requests = []
    for model in range(num_models):
        draws = random.Random(f"{seed} {model}")
        gap = low * (high / low) ** (model / max(num_models - 1, 1))
        for at_seconds in _arrivals(draws, speed / gap, seconds):
            lengths = draws.choice(trace)
            requests.append(Request(at_seconds, model, lengths.num_in, lengths.num_out))
    return ordered(f"serverless x{speed:g}", num_models, requests)


def dealt(
    log: Sequence[TraceRequest],
    popular: Sequence[TraceRequest],
    *,
    num_models: int,
    speed: float,
    seconds: float,
    seed: int = 0,
) -> Workload:
    """Return one service's real arrivals, `speed` times as fast, dealt to models by popularity.

    Requests that come right after each other often belong together, so a model gets a run of them:
    what comes within a burst's gap of the request before goes to the same model.

    Args:
        log: The service's log: arrivals and lengths.
        popular: The log whose popularity is fitted.
        num_models: How many models there are.
        speed: How many seconds of the log pass in one.
        seconds: How much is replayed, in seconds of the replay.
        seed: Of the draws.
    """
    draws = random.Random(seed)
    popularity = shares(num_models, fitted_exponent(counts_by_rank(popular)))
    taken = [entry for entry in log if entry.at_seconds / speed < seconds]
    gaps = [BURST_GAP_SECONDS + 1, *(b.at_seconds - a.at_seconds for a, b in pairwise(taken))]
    requests = []
    model = 0
    for entry, gap in zip(taken, gaps, strict=False):
        if gap > BURST_GAP_SECONDS:
            (model,) = draws.choices(range(num_models), popularity)
        at_seconds = entry.at_seconds / speed
        requests.append(Request(at_seconds, model, entry.num_in, entry.num_out))
    return ordered(f"azure dealt x{speed:g}", num_models, requests)


def _arrivals(draws: random.Random, rate: float, seconds: float) -> Iterator[float]:
    """Yield when something comes that comes `rate` times a second on average."""
    at_seconds = draws.expovariate(rate)
    while at_seconds < seconds:
        yield at_seconds
        at_seconds += draws.expovariate(rate)
