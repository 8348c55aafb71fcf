"""Which models shall come up, how much that is worth, and what they lack."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

__all__ = ["Cause", "Lack", "Want"]


class Cause(IntEnum):
    """Why a model shall come up; what stands first goes first."""

    ORDER = 0  # somebody said so: others may have to go for it
    REQUEST = 1  # requests wait: others may have to go for it, as long as one does
    AHEAD = 2  # somebody may ask for it soon: nobody goes for it


@dataclass(frozen=True)
class Want:
    """A model that shall come up.

    Attributes:
        model_id: Its name.
        cause: Why, which says who may have to go for it.
        reason: The same as a sentence.
        since: When it was first wanted, by the loop's clock.
    """

    model_id: str
    cause: Cause
    reason: str
    since: float

    @property
    def rank(self) -> tuple[bool, float]:
        """What comes first is considered first."""
        return self.cause is Cause.AHEAD, self.since


@dataclass(frozen=True)
class Lack:
    """What a start lacks that nobody could be stopped for.

    Attributes:
        devices: Where it would be.
        missing: What is missing, in bytes by place.
    """

    devices: tuple[str, ...]
    missing: Mapping[str, int]
