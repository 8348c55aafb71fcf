"""What is asked of every model, from its requests and its engine's counters."""

import asyncio
from collections.abc import Callable, Mapping

from kvcached_core.errors import KVCachedError
from kvcached_gateway.control.sizes import Sizes
from kvcached_gateway.models.model import Model
from kvcached_gateway.policy.demand import Demand, weighted_rate
from kvcached_gateway.policy.prewarm import Habits
from kvcached_gateway.settings.config import ServiceClass

__all__ = ["Demands"]


class Demands:
    """What is asked of every model.

    Args:
        models: Every model, by its name. Read at each call.

    Attributes:
        of: What is known of a model's requests: `Line.demand`, once there is a line.
        waiting: How many requests wait for a model: `Line.waiting`.
        oldest_wait_seconds: How long the oldest of them has: `Line.oldest_wait_seconds`.
        habits: Which models are asked one soon after the other.
    """

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models
        self._clock = asyncio.get_running_loop().time
        self._num_seen: dict[str, int] = {}
        self.of: Callable[[str], Demand] = _no_line
        self.waiting: Callable[[str], int] = _nobody
        self.oldest_wait_seconds: Callable[[str, float], float] = _no_time
        self.habits = Habits()

    def look(self, now: float) -> None:
        """Take notice of whom requests came for since the last look."""
        for name in self._models:
            num_arrivals = self.of(name).num_arrivals
            if num_arrivals > self._num_seen.get(name, 0):
                self.habits.arrived(name, now)
            self._num_seen[name] = num_arrivals

    def weighted_rate(
        self, model: Model, sizes: Sizes, classes: Mapping[str, ServiceClass]
    ) -> float | None:
        """Return how hard a model presses on its devices; None where that is not known yet."""
        service = classes.get(model.settings.class_name or "")
        return weighted_rate(
            self.of(model.id).tokens.per_second,
            sizes.of(model.id).token_bytes * model.settings.tensor_parallel,
            None if service is None else service.tpot_seconds,
        )

    async def read(self) -> None:
        """Read the counters of every engine that answers, all at once."""
        await asyncio.gather(*(self._read(model) for model in list(self._models.values())))

    async def _read(self, model: Model) -> None:
        if model.engine is None:
            return
        try:
            found = await model.engine.counters()
        except (KVCachedError, OSError, ValueError):
            return  # one that does not answer is its model's business
        computed = found.num_prompt_tokens - found.num_cached_tokens + found.num_generated_tokens
        self.of(model.id).counted(computed, found.num_prompt_tokens, self._clock())


def _no_line(_model_id: str) -> Demand:
    """Know nothing: nobody has asked for anything yet."""
    return Demand()


def _nobody(_model_id: str) -> int:
    """Let nobody wait."""
    return 0


def _no_time(_model_id: str, _now: float) -> float:
    """Let nobody have waited."""
    return 0.0
