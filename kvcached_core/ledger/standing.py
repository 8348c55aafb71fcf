"""What the rules look at of an instance, and what one keeps that waits itself."""

from typing import Protocol


class Standing(Protocol):
    """What the rules look at of an instance, sizes in bytes; they change nothing of it."""

    @property
    def index(self) -> int:
        """The number of its row."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def priority(self) -> int:
        """Instances with a lower value give first."""

    @property
    def last_used_ns(self) -> int:
        """When its pages were for something else the last time."""

    @property
    def floor_bytes(self) -> int:
        """What it can always get back."""

    @property
    def unmet_floor_bytes(self) -> int:
        """What is missing to that."""

    @property
    def least_bytes(self) -> int:
        """What its largest request needs."""

    @property
    def page_bytes(self) -> int:
        """A page, on all its ranks."""

    @property
    def resident_bytes(self) -> int:
        """What it has mapped."""

    @property
    def held_bytes(self) -> int:
        """What it has mapped, or is about to, for KV."""

    @property
    def weights_bytes(self) -> int:
        """What it has mapped for weights."""

    @property
    def weights_offered_bytes(self) -> int:
        """What of these may be asked for."""

    @property
    def weights_kept_until_ns(self) -> int:
        """Until when only a higher priority gets some."""

    @property
    def waking_since_ns(self) -> int:
        """Since when its weights come back, or 0."""

    @property
    def used_bytes(self) -> int:
        """What requests hold of it."""

    @property
    def cached_bytes(self) -> int:
        """What only the prefix cache holds."""

    @property
    def coming_bytes(self) -> int:
        """What it is about to unmap."""

    @property
    def waiting_bytes(self) -> int:
        """What it lacks itself."""


def is_short(row: Standing) -> bool:
    """Return whether it waits for memory and has requests that run."""
    return bool(row.waiting_bytes) and row.used_bytes > row.page_bytes  # page 0 is always used


def half_above(row: Standing, asker: Standing) -> int:
    """Return what `row` gives, in pages, until both hold the same; none where it is negative."""
    half = (row.held_bytes - row.coming_bytes - asker.held_bytes) // 2
    return half - half % max(row.page_bytes, 1)


def to_yield(row: Standing, asker: Standing) -> int:
    """Return what `row` gives as its requests end, if both wait and are equals."""
    is_equal = row.priority == asker.priority
    return max(half_above(row, asker), 0) if is_equal and is_short(row) else 0
