"""The states of a model."""

from enum import StrEnum

__all__ = ["GONE", "LOADING", "PASSING", "UP", "State"]


class State(StrEnum):
    """What a model does."""

    COLD = "cold"  # it has no engine
    STARTING = "starting"  # its engine starts, or is being adopted
    WARM = "warm"  # nobody asks it for anything
    BUSY = "busy"  # somebody has a lease
    YIELDED = "yielded"  # it is idle, and some of its weights are gone
    DRAINING = "draining"  # it gives no leases, and ends when the last is back
    FAILED = "failed"  # it ended by itself, and is not tried again yet


UP = frozenset({State.WARM, State.BUSY, State.YIELDED})
PASSING = frozenset({State.STARTING, State.DRAINING})
GONE = frozenset({State.COLD, State.FAILED})
# Whoever waits for one of these waits for a start or a wake, and not for other requests.
LOADING = GONE | {State.STARTING, State.YIELDED}
