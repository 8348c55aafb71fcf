"""What the next batch of an engine that plans by counting takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Demand:
    """What the next batch takes at most, in blocks of a pool.

    Attributes:
        num_running: For what runs, and for the prompt that was begun.
        num_queued: For requests that wait, as many as a batch may take.
        num_least: For the one of them that needs least; 0 if there is none, or nobody has to ask.
        num_requests: How many of those that wait these are.
    """

    num_running: int
    num_queued: int
    num_least: int
    num_requests: int = 0
