"""What the parts of an engine's step take, timed where they run."""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

PARTS = ("schedule", "execute_model", "update_from_output")


class Stopwatch:
    """Times the parts of an engine's step, in the engine's own thread.

    Args:
        core: The engine core.
        count_calls: Returns how often the driver mapped and unmapped so far, in whatever thread.
    """

    def __init__(self, core: Any, count_calls: Callable[[], int]) -> None:
        self.starts: list[float] = []
        self.num_calls: list[int] = []
        self._count_calls = count_calls
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        for owner, part in zip(
            (core.scheduler, core.model_executor, core.scheduler), PARTS, strict=True
        ):
            setattr(owner, part, self._timed(part, getattr(owner, part)))

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds[part].append(time.perf_counter() - start)
            if part == PARTS[0]:
                self.starts.append(start)
                self.num_calls.append(self._count_calls())
            return result

        return timed

    def take(self) -> dict[str, float]:
        """Return the medians since the last call, in microseconds."""
        between = [after - before for before, after in itertools.pairwise(self.starts)]
        medians = {f"{part}, median us": _median(self.seconds[part]) for part in PARTS}
        medians["step to step, median us"] = _median(between)
        medians["step to step, longest ms"] = max(between, default=0.0) * 1e3
        has_calls = [after > before for before, after in itertools.pairwise(self.num_calls)]
        with_calls = list(itertools.compress(between, has_calls))
        without = [span for span, has in zip(between, has_calls, strict=True) if not has]
        medians["steps without driver calls, median us"] = _median(without)
        medians["steps with driver calls, median us"] = _median(with_calls)
        medians["steps with driver calls"] = len(with_calls)
        self.starts.clear()
        self.num_calls.clear()
        for values in self.seconds.values():
            values.clear()
        return medians


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds or [0.0]) * 1e6
