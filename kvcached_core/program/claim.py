"""What a program holds of what it said to need: the arithmetic, and nothing else."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """What a program has of one device; sizes in bytes.

    Attributes:
        needed_bytes: What it said to need; the room is its own until it ends.
        held_bytes: What it has allocated, which may be more.
    """

    needed_bytes: int
    held_bytes: int = 0

    @property
    def announced_bytes(self) -> int:
        """What it may still allocate, and nobody else."""
        return max(self.needed_bytes - self.held_bytes, 0)


@dataclass(frozen=True)
class Move:
    """What is to be written into the program's row, all at once.

    Attributes:
        mapped_bytes: What it has allocated since the last time.
        unmapped_bytes: What it has freed since then.
        announced_bytes: What it may still allocate.
    """

    mapped_bytes: int
    unmapped_bytes: int
    announced_bytes: int


def move(before: Claim, after: Claim) -> Move:
    """Return what differs."""
    more_bytes = after.held_bytes - before.held_bytes
    return Move(max(more_bytes, 0), max(-more_bytes, 0), after.announced_bytes)
