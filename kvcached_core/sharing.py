"""Who gives memory to whom: the rules, as functions of the rows.

Memory that nobody needs goes first, whoever holds it; who waits itself, with requests that run,
needs what it has idle, and gives of it until both hold the same. Cached blocks come next, from the
lowest priority, and among equals from who was unused longest. Live requests stop only for an
instance below its floor, or where their own is over its limit. Nobody is asked below its own floor:
what it gave would be kept free for it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from kvcached_core.errors import PolicyError
from kvcached_core.units import format_bytes

MIN_PRIORITY, MAX_PRIORITY = -1000, 1000


@dataclass(frozen=True)
class Policy:
    """What somebody decided about an instance.

    Attributes:
        limit_bytes: What it may hold at most; None for no limit.
        floor_bytes: What it can always get back.
        priority: Who has a lower one gives first.
    """

    limit_bytes: int | None = None
    floor_bytes: int = 0
    priority: int = 0


NO_POLICY = Policy()


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
        """Who has a lower one gives first."""

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
    def promised_bytes(self) -> int:
        """What it is about to map."""

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


@dataclass
class Share:
    """What one instance is asked for.

    Attributes:
        index: The number of its row.
        give_bytes: Idle and cached bytes.
        owed_bytes: Bytes for which requests have to stop.
    """

    index: int
    give_bytes: int = 0
    owed_bytes: int = 0


def shares(asker: Standing, peers: Iterable[Standing], num_bytes: int) -> list[Share]:
    """Return who shall give how much, so that `asker` gets `num_bytes` if there are as many."""
    found = [
        (peer, Share(peer.index))
        for peer in sorted(peers, key=lambda peer: (peer.priority, peer.last_used_ns))
    ]
    left = {peer.index: _above_floor(peer) for peer, _ in found}
    for is_idle in (True, False):
        for peer, share in found:
            spare = _idle_to_give(peer, asker) if is_idle else peer.cached_bytes
            give = min(spare, left[peer.index], num_bytes)
            share.give_bytes += give
            left[peer.index] -= give
            num_bytes -= give
    num_bytes = min(num_bytes, asker.unmet_floor_bytes)
    for peer, share in found:
        share.owed_bytes = min(peer.used_bytes, left[peer.index], num_bytes)
        num_bytes -= share.owed_bytes
    return [share for _, share in found if share.give_bytes or share.owed_bytes]


def check(row: Standing, policy: Policy, peers: Iterable[Standing], capacity_bytes: int) -> None:
    """Refuse a policy that the instance could not live with, or that cannot be promised.

    Args:
        row: The instance.
        policy: What is wanted.
        peers: The other instances of the device.
        capacity_bytes: What all of them share.

    Raises:
        PolicyError: With what is allowed; for floors, with the arithmetic.
    """
    name, limit, floor = row.name, policy.limit_bytes, policy.floor_bytes
    if not MIN_PRIORITY <= policy.priority <= MAX_PRIORITY:
        raise PolicyError(
            f"a priority of {policy.priority} for {name!r} is not allowed; "
            f"use {MIN_PRIORITY} to {MAX_PRIORITY}, the higher the later it gives"
        )
    if limit is not None and limit > capacity_bytes:
        raise PolicyError(
            f"a limit of {format_bytes(limit)} for {name!r} is above what all instances share, "
            f"{format_bytes(capacity_bytes)}; allowed are sizes up to that, or none"
        )
    if limit is not None and limit < row.least_bytes:
        raise PolicyError(
            f"a limit of {format_bytes(limit)} for {name!r} is below what its largest request "
            f"needs, {format_bytes(row.least_bytes)}; allowed are sizes from that on, or none"
        )
    if limit is not None and floor > limit:
        raise PolicyError(
            f"{name!r} cannot have a floor of {format_bytes(floor)} and a limit of "
            f"{format_bytes(limit)}; the floor must not be above the limit"
        )
    _check_floors(name, floor, peers, capacity_bytes)


def _check_floors(name: str, floor: int, peers: Iterable[Standing], capacity_bytes: int) -> None:
    others = {other.name: other.floor_bytes for other in peers if other.floor_bytes}
    total = floor + sum(others.values())
    if floor and total > capacity_bytes:
        terms = [f"{format_bytes(floor)} ({name})"]
        terms += [f"{format_bytes(size)} ({other})" for other, size in others.items()]
        raise PolicyError(
            f"floors of {' + '.join(terms)} = {format_bytes(total)} are more than the "
            f"{format_bytes(capacity_bytes)} that all instances share; allowed for {name!r} are "
            f"up to {format_bytes(max(capacity_bytes - sum(others.values()), 0))}"
        )


def _idle_to_give(row: Standing, asker: Standing) -> int:
    idle = row.resident_bytes - row.used_bytes - row.cached_bytes - row.coming_bytes
    is_short = row.waiting_bytes and row.used_bytes > row.page_bytes  # page 0 is always used
    if is_short and row.priority >= asker.priority:
        # It stopped a request for these pages, and would stop the next one if it gave them.
        half = (_held(row) - _held(asker)) // 2
        idle = min(idle, half - half % max(row.page_bytes, 1))
    return max(idle, 0)


def _above_floor(row: Standing) -> int:
    return max(_held(row) - row.floor_bytes, 0)


def _held(row: Standing) -> int:
    return row.resident_bytes + row.promised_bytes
