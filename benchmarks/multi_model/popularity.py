"""How unevenly models are asked: Zipf's law, fitted to a log."""

from collections import Counter
from collections.abc import Sequence
from math import log

from multi_model.traces import TraceRequest

# Exponents between which the fitted one is looked for.
LEAST, MOST = 0.0, 5.0
NUM_HALVINGS = 60


def counts_by_rank(trace: Sequence[TraceRequest]) -> list[int]:
    """Return how often each model of a log was asked, the busiest first."""
    return sorted(Counter(entry.model for entry in trace).values(), reverse=True)


def fitted_exponent(counts: Sequence[int]) -> float:
    """Return the exponent under which these counts, by rank, are likeliest.

    Rank `k` then has a share in proportion to `k` to the power of minus the exponent.

    Raises:
        ValueError: If nothing was counted.
    """
    if not sum(counts):
        raise ValueError("an exponent was asked for of a log without requests")
    logs = [log(rank) for rank in range(1, len(counts) + 1)]
    wanted = sum(count * size for count, size in zip(counts, logs, strict=True)) / sum(counts)
    low, high = LEAST, MOST
    for _ in range(NUM_HALVINGS):  # the mean of log rank falls with the exponent
        middle = (low + high) / 2
        found = shares(len(counts), middle)
        mean = sum(share * size for share, size in zip(found, logs, strict=True))
        low, high = (middle, high) if mean > wanted else (low, middle)
    return (low + high) / 2


def shares(num_models: int, exponent: float) -> list[float]:
    """Return the share of all requests that each model gets, the busiest first; their sum is 1."""
    weights = [rank**-exponent for rank in range(1, num_models + 1)]
    return [weight / sum(weights) for weight in weights]
