"""Who gives memory to whom: the rules, as functions of the rows.

Memory that nobody needs goes first, whoever holds it; who waits itself, with requests that run,
needs what it has idle, and gives of it until both hold the same. Cached blocks come next, from the
lowest priority, and among equals from who was unused longest. Live requests stop only for an
instance below its floor, or where their own is over its limit. Nobody is asked below its own floor:
what it gave would be kept free for it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kvcached_core.errors import PolicyError
from kvcached_core.ledger_file import Row
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


@dataclass
class Share:
    """What one instance is asked for.

    Attributes:
        row: The instance.
        give_bytes: Idle and cached bytes.
        owed_bytes: Bytes for which requests have to stop.
    """

    row: Row
    give_bytes: int = 0
    owed_bytes: int = 0


def shares(asker: Row, peers: Iterable[Row], num_bytes: int) -> list[Share]:
    """Return who shall give how much, so that `asker` gets `num_bytes` if there are as many."""
    found = [Share(row) for row in sorted(peers, key=lambda row: (row.priority, row.last_used_ns))]
    left = {share.row.index: _above_floor(share.row) for share in found}
    for is_idle in (True, False):
        for share in found:
            row = share.row
            spare = _idle_to_give(row, asker) if is_idle else row.cached_bytes
            give = min(spare, left[row.index], num_bytes)
            share.give_bytes += give
            left[row.index] -= give
            num_bytes -= give
    num_bytes = min(num_bytes, asker.unmet_floor_bytes)
    for share in found:
        share.owed_bytes = min(share.row.used_bytes, left[share.row.index], num_bytes)
        num_bytes -= share.owed_bytes
    return [share for share in found if share.give_bytes or share.owed_bytes]


def check(row: Row, policy: Policy, peers: Iterable[Row], capacity_bytes: int) -> None:
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


def _check_floors(name: str, floor: int, peers: Iterable[Row], capacity_bytes: int) -> None:
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


def _idle_to_give(row: Row, asker: Row) -> int:
    idle = row.resident_bytes - row.used_bytes - row.cached_bytes - row.coming_bytes
    is_short = row.waiting_bytes and row.used_bytes > row.page_bytes  # page 0 is always used
    if is_short and row.priority >= asker.priority:
        # It stopped a request for these pages, and would stop the next one if it gave them.
        half = (_held(row) - _held(asker)) // 2
        idle = min(idle, half - half % max(row.page_bytes, 1))
    return max(idle, 0)


def _above_floor(row: Row) -> int:
    return max(_held(row) - row.floor_bytes, 0)


def _held(row: Row) -> int:
    return row.resident_bytes + row.promised_bytes
