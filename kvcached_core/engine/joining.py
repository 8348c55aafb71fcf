"""Ranks that schedule alike: rank 0 enters their server in the ledgers, and tells the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvcached_core.engine.instance import Instance
from kvcached_core.engine.ranks import NUM_IDLE_TURNS, Ranks
from kvcached_core.engine.telling import tell_all, tell_at_once, tell_stages
from kvcached_core.errors import FirstRankError, KVCachedError
from kvcached_core.memory.devices import Device


@dataclass(frozen=True)
class Group:
    """The processes that hold a part of every token's keys and values.

    Attributes:
        rank: This one's number in the group.
        ranks: What torch calls each of them.
        channel: torch's group of them on the host; several ranks need one.
        are_stages: Whether some run a step behind the first one, and wait for it.
    """

    rank: int = 0
    ranks: Sequence[int] = (0,)
    channel: Any = None
    are_stages: bool = False


def join_ranks(
    device: Device,
    group: Group,
    enter: Callable[[list[Device]], Instance],
    *,
    num_idle_turns: int = NUM_IDLE_TURNS,
) -> Ranks:
    """Return this rank's view; rank 0 enters the server in the ledgers of all ranks' devices.

    Args:
        device: This rank's device.
        group: The ranks, all of which call this.
        enter: Returns the instance on these devices.
        num_idle_turns: See `Ranks`.

    Raises:
        KVCachedError: On rank 0, as `enter`.
        FirstRankError: On the others, if rank 0 could not.
    """
    if len(group.ranks) == 1:
        return Ranks.alone(enter([device]), device)
    return _join_many(device, group, enter, num_idle_turns)


def _join_many(
    device: Device, group: Group, enter: Callable[[list[Device]], Instance], num_idle_turns: int
) -> Ranks:
    from torch import distributed  # noqa: PLC0415  an engine of several ranks has it

    first, channel = group.ranks[0], group.channel
    devices: list[Any] = [None] * len(group.ranks)
    distributed.all_gather_object(devices, device, group=channel)
    instance, problem = None, None
    told: list[Any] = [None, None, None]
    if group.rank == 0:
        try:
            instance = enter(devices)
            seats = [instance.seat(device) for device in devices]
            told = [seats, instance.capacity_bytes, None]
        except KVCachedError as error:
            problem, told[2] = error, str(error)
    distributed.broadcast_object_list(told, src=first, group=channel)
    seats, capacity_bytes, reason = told
    if reason is not None:
        raise problem or FirstRankError(f"rank 0 could not start: {reason}")

    ranks = group.ranks
    if group.are_stages:
        share = tell_stages(group.rank, ranks, channel)
    else:
        share = tell_at_once(ranks, channel)
    return Ranks(
        instance,
        seats[group.rank],
        capacity_bytes,
        share,
        tell_all(ranks, channel),
        num_idle_turns=num_idle_turns,
    )
