"""What became of a wish that somebody outside has of an instance."""

from dataclasses import dataclass
from enum import StrEnum

from kvcached_core.units import format_bytes


class Outcome(StrEnum):
    """How a wish ended."""

    APPLIED = "applied"
    IN_PROGRESS = "in progress"
    REFUSED = "refused"


@dataclass(frozen=True)
class Result:
    """What became of a wish.

    Attributes:
        instance: The instance's name.
        outcome: Applied, in progress or refused; refused means that nothing was changed.
        remaining_bytes: What is still to come while it is in progress.
        before_bytes: Resident bytes at the beginning, on all devices.
        after_bytes: Resident bytes at the end.
        reason: Why it was refused.
        problems: Why ledgers of further devices could not be used, each with what to do. Nothing
            was changed there, and nobody knows whether the instance is on them.
    """

    instance: str
    outcome: Outcome
    remaining_bytes: int = 0
    before_bytes: int = 0
    after_bytes: int = 0
    reason: str = ""
    problems: tuple[str, ...] = ()


def describe(result: Result) -> str:
    """Return a result as one line."""
    if result.outcome is Outcome.REFUSED:
        return f"{result.instance}: refused: {result.reason}"
    moved = f"{format_bytes(result.before_bytes)} -> {format_bytes(result.after_bytes)}"
    coming = f", {format_bytes(result.remaining_bytes)} to come" if result.remaining_bytes else ""
    return f"{result.instance}: {result.outcome}, {moved}{coming}"
