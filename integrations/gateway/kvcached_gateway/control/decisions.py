"""What the controller decided, and why: for `kvcached explain`, and for who waits."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal

from kvcached_gateway.admin.views import Decision

__all__ = ["Decisions", "Verb"]

NUM_KEPT = 1000
# `wait`: a start that is wanted has to wait. `hold`: one that is up takes no new requests.
Verb = Literal["start", "stop", "wait", "wake", "move", "hold"]


class Decisions:
    """The last decisions.

    Args:
        wall: The time of day, in seconds since 1970.

    Attributes:
        on_add: Called with each new one.
    """

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self.on_add: list[Callable[[Decision], None]] = []
        self._kept: deque[Decision] = deque(maxlen=NUM_KEPT)
        self._waits: dict[str, str] = {}

    def __iter__(self) -> Iterator[Decision]:
        """Yield them, the oldest first."""
        return iter(self._kept)

    def add(self, model_id: str, verb: Verb, reason: str, **inputs: Any) -> None:
        """Keep one; a wait for the same reason as before is not a new one."""
        if verb == "wait":
            if self._waits.get(model_id) == reason:
                return
            self._waits[model_id] = reason
        else:
            self._waits.pop(model_id, None)
        decision = Decision(self._wall(), verb, model_id, reason, inputs)
        self._kept.append(decision)
        for tell in self.on_add:
            tell(decision)

    def forget_wait(self, model_id: str) -> None:
        """Say that a model waits for nothing any more."""
        self._waits.pop(model_id, None)

    def hindrance(self, model_id: str) -> str:
        """Return what a model that shall start waits for; nothing where it does not."""
        return self._waits.get(model_id, "")

    def of(self, model_id: str) -> list[Decision]:
        """Return those about a model, the oldest first."""
        return [one for one in self._kept if one.model_id == model_id]
