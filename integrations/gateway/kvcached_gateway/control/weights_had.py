"""What was seen of weights that are there: since when they are, and if their engine gives them.

The row of an engine says the last only while it is idle, so it is remembered.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from kvcached_core.ledger.view import InstanceView

__all__ = ["WeightsHad"]


@dataclass
class _Had:
    """What is known of one model's weights.

    Attributes:
        since: Since when all are there, by the loop's clock; in the past where some are not.
        num_activations: How often they had come back by then.
        kept_until_ns: Until when its engine gives none to equals, by `time_ns`.
        gives_none: Whether its engine was idle, and offered none.
    """

    since: float = -math.inf
    num_activations: int = -1
    kept_until_ns: int = 0
    gives_none: bool = False


class WeightsHad:
    """What is known of all models' weights."""

    def __init__(self) -> None:
        self._had: dict[str, _Had] = {}

    def look(self, there: Mapping[str, InstanceView], now: float) -> None:
        """Notice what changed.

        Args:
            there: The row of each model that is up.
            now: The loop's seconds.
        """
        self._had = {name: self._had.get(name, _Had()) for name in there}
        for name, view in there.items():
            had = self._had[name]
            if view.weights_offered_bytes:
                had.kept_until_ns, had.gives_none = view.weights_kept_until_ns, False
            if view.weights_bytes < view.weights_needed_bytes:
                had.num_activations, had.since = -1, -math.inf
            elif had.num_activations != view.activations.num:
                had.num_activations, had.since = view.activations.num, now

    def seconds(self, name: str, now: float) -> float:
        """Return how long a model has had all of its weights; infinite where it gave some."""
        return now - self._had[name].since if name in self._had else math.inf

    def kept_seconds(self, name: str) -> float:
        """Return how long its engine keeps them from equals; not above 0 where it does not."""
        return (self._had[name].kept_until_ns - time.time_ns()) / 1e9 if name in self._had else 0.0

    def gives_none(self, name: str) -> bool:
        """Whether its engine was idle, and offered none; until it offers some."""
        return name in self._had and self._had[name].gives_none

    def gave_none(self, name: str) -> None:
        """Say that its engine was idle for a while, and offered none."""
        if name in self._had:
            self._had[name].gives_none = True
