"""Who takes no new requests now, and for whom."""

from dataclasses import dataclass, field

from kvcached_gateway.policy.turns import NOBODY, Turn

__all__ = ["Holds"]


@dataclass
class Holds:
    """Who holds back. `Turns` alone changes it; the line and the starts go by it.

    Attributes:
        turns: Who does for each model that waits.
    """

    turns: dict[str, Turn] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """All that hold back."""
        return {name for turn in self.turns.values() for name in turn.held}

    def turn(self, waiter_id: str) -> Turn:
        """Return who holds back for a model."""
        return self.turns.get(waiter_id, NOBODY)

    def held(self, model_id: str) -> str:
        """Return why a model takes no new requests; nothing where it does."""
        return next((turn.reason for turn in self.turns.values() if model_id in turn.held), "")
