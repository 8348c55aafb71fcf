"""Who gives memory to whom: the rules, as functions of the rows.

Memory that nobody needs goes first, whoever holds it. An instance that waits itself, with requests
that run, needs what it has idle, and gives of it until both hold the same. Cached blocks come next,
from the lowest priority, and among equals from the instance that was unused longest. Of two equals
that both wait, the one that holds more is asked for half of the difference, where that is enough:
it gives as its requests end, and lets in no new one meanwhile. Weights that
it offers go after its cached blocks, and before those of the next one. Just after an instance woke,
only a higher priority gets its weights.

A floor guarantees what requests hold and what they wait for. Idle pages and cached blocks below it
are borrowed last, by an instance whose request waits, and only while their owner does not wait. The
owner gets them back on demand: live requests of others stop for an instance below its floor, for
one that wakes if their priority is lower, and for no other reason but a limit of their own. Limits
and floors are about KV, not weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvcached_core.errors import PolicyError
from kvcached_core.ledger.standing import Standing, half_above, is_short, to_yield
from kvcached_core.units import MAX_PRIORITY, MIN_PRIORITY, format_bytes


@dataclass(frozen=True)
class Policy:
    """What somebody decided about an instance.

    Attributes:
        limit_bytes: What it may hold at most; None for no limit.
        floor_bytes: What it can always get back.
        priority: Instances with a lower value give first.
    """

    limit_bytes: int | None = None
    floor_bytes: int = 0
    priority: int = 0


NO_POLICY = Policy()


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


def shares(
    asker: Standing,
    peers: Iterable[Standing],
    num_bytes: int,
    *,
    is_waiting: bool = True,
    is_static: bool = False,
    now_ns: int = 0,
) -> list[Share]:
    """Return who shall give how much, so that `asker` gets `num_bytes` if there are as many.

    Args:
        asker: The instance that lacks memory.
        peers: The other instances of the device.
        num_bytes: What it lacks.
        is_waiting: Whether a request waits for it: then what others have idle or cached below their
            floors is borrowed, too.
        is_static: Whether it is for what was announced. Requests stop for that only if it is for
            weights that come back, and only those of lower priorities.
        now_ns: The time, by `time_ns`.
    """
    order = sorted(peers, key=lambda peer: (peer.priority, peer.last_used_ns))
    found = [Share(peer.index) for peer in order]
    idle = [_idle_to_give(peer, asker) for peer in order]
    cached = [peer.cached_bytes for peer in order]
    above_floor = [_above_floor(peer) for peer in order]
    below_floor = [0 if peer.waiting_bytes else peer.held_bytes for peer in order]
    for left in (above_floor, below_floor) if is_waiting else (above_floor,):
        for spare in (idle, cached):
            for number, share in enumerate(found):
                give = max(min(spare[number], left[number], num_bytes), 0)
                share.give_bytes += give
                spare[number] -= give
                above_floor[number] -= give
                num_bytes -= give
                if spare is cached and left is above_floor:
                    give = min(_weights_to_give(order[number], asker, now_ns), num_bytes)
                    share.give_bytes += give
                    num_bytes -= give
    if is_waiting and not is_static and not asker.unmet_floor_bytes:
        yields = [
            max(min(to_yield(peer, asker) - share.give_bytes, left), 0)
            for peer, share, left in zip(order, found, above_floor, strict=True)
        ]
        num_bytes -= _share_out(num_bytes, yields, found)
    if not is_static:
        num_bytes = min(num_bytes, asker.unmet_floor_bytes)
    for number, share in enumerate(found):
        peer = order[number]
        if is_static and not (asker.waking_since_ns and peer.priority < asker.priority):
            continue
        share.owed_bytes = max(min(peer.used_bytes, above_floor[number], num_bytes), 0)
        num_bytes -= share.owed_bytes
    return [share for share in found if share.give_bytes or share.owed_bytes]


def check(
    row: Standing,
    policy: Policy,
    peers: Sequence[Standing],
    capacity_bytes: int,
    *,
    is_forced: bool = False,
) -> None:
    """Refuse a policy that the instance could not live with, or that cannot be promised.

    Args:
        row: The instance, as it is now.
        policy: What is wanted.
        peers: The other instances of the device.
        capacity_bytes: What all of them share.
        is_forced: Whether a floor may leave no room for the longest request of another instance.

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
    if floor > row.floor_bytes and not is_forced:
        for other in peers:
            floors = {peer.name: peer.floor_bytes for peer in peers if peer is not other}
            check_longest(other.name, other.least_bytes, floors | {name: floor}, capacity_bytes)


def check_longest(
    name: str, longest_bytes: int, floors: Mapping[str, int], capacity_bytes: int
) -> None:
    """Refuse floors beside which the longest request of an instance could never be served.

    Args:
        name: The instance.
        longest_bytes: What its longest request needs.
        floors: The floors of the other instances of its device, by their names.
        capacity_bytes: What all of them share.

    Raises:
        PolicyError: With the arithmetic.
    """
    kept_bytes = sum(floors.values())
    if kept_bytes and longest_bytes > capacity_bytes - kept_bytes:
        raise PolicyError(
            f"the longest request of {name!r} needs {format_bytes(longest_bytes)}, but floors of "
            f"{_terms(floors)} leave {format_bytes(max(capacity_bytes - kept_bytes, 0))} of the "
            f"{format_bytes(capacity_bytes)} that all instances share, so it would wait for ever; "
            f"lower a floor, or the length that {name!r} allows"
        )


def _check_floors(name: str, floor: int, peers: Iterable[Standing], capacity_bytes: int) -> None:
    others = {other.name: other.floor_bytes for other in peers if other.floor_bytes}
    total = floor + sum(others.values())
    if floor and total > capacity_bytes:
        raise PolicyError(
            f"floors of {_terms({name: floor} | others)} = {format_bytes(total)} are more than the "
            f"{format_bytes(capacity_bytes)} that all instances share; allowed for {name!r} are "
            f"up to {format_bytes(max(capacity_bytes - sum(others.values()), 0))}"
        )


def _terms(floors: Mapping[str, int]) -> str:
    return " + ".join(f"{format_bytes(size)} ({name})" for name, size in floors.items() if size)


def _idle_to_give(row: Standing, asker: Standing) -> int:
    idle = _idle(row) - row.coming_bytes
    if is_short(row) and row.priority >= asker.priority:
        # It stopped a request for these pages, and would stop the next one if it gave them.
        idle = min(idle, half_above(row, asker))
    return max(idle, 0)


def _share_out(num_bytes: int, most: Sequence[int], found: Sequence[Share]) -> int:
    """Ask each for as much as it may give, if that is enough; return how much was asked for.

    With less of it nothing could be let in, and who gives would let in nothing meanwhile either.
    """
    if sum(most) < num_bytes:
        return 0
    num_left = num_bytes
    for share, each in zip(found, most, strict=True):
        give = min(each, num_left)
        share.give_bytes += give
        num_left -= give
    return num_bytes - num_left


def _weights_to_give(row: Standing, asker: Standing, now_ns: int) -> int:
    if now_ns < row.weights_kept_until_ns and asker.priority <= row.priority:
        return 0
    offered = min(row.weights_offered_bytes, row.weights_bytes)
    # What is on its way beyond all that is idle are weights.
    return max(offered - max(row.coming_bytes - _idle(row), 0), 0)


def _idle(row: Standing) -> int:
    return row.resident_bytes - row.weights_bytes - row.used_bytes - row.cached_bytes


def _above_floor(row: Standing) -> int:
    return max(row.held_bytes - row.floor_bytes, 0)
