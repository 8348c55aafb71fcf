"""The ranks of one SGLang server: rank 0 enters it in the ledgers, and tells the others."""

from collections.abc import Callable
from typing import Any

from kvcached_core.config import Config
from kvcached_core.engine.instance import Instance
from kvcached_core.engine.ranks import NUM_IDLE_TURNS, FirstRankError, Ranks
from kvcached_core.errors import KVCachedError
from kvcached_core.memory.devices import Device


def join_ranks(
    device: Device,
    config: Config,
    group: Any,
    *,
    name: str,
    engine: str,
    does_loop_sleep: bool = False,
) -> Ranks:
    """Return this rank's view; rank 0 enters the server in the ledgers of all ranks' devices.

    Args:
        device: This rank's device.
        config: The settings.
        group: SGLang's group of the ranks that hold a part of every token's keys and values.
        name: What the instance is called when nobody named it.
        engine: The engine and its release.
        does_loop_sleep: Whether an idle turn of SGLang's loop takes a second (`--sleep-on-idle`).

    Raises:
        KVCachedError: On rank 0, as `Instance`.
        FirstRankError: On the others, if rank 0 could not.
    """

    def enter(devices: list[Device]) -> Instance:
        return Instance(
            devices,
            config,
            name=config.name,
            default_name=name,
            engine=engine,
            on_ring=lambda: None,  # the scheduler's loop never sleeps for long, and looks by itself
        )

    if group.world_size == 1:
        instance = enter([device])
        return Ranks(instance, instance.seat(device), instance.capacity_bytes)
    return _join_many(device, group, enter, 1 if does_loop_sleep else NUM_IDLE_TURNS)


def _join_many(
    device: Device,
    group: Any,
    enter: Callable[[list[Device]], Instance],
    num_idle_turns: int,
) -> Ranks:
    import torch
    from torch import distributed

    first, channel = group.ranks[0], group.cpu_group
    devices: list[Any] = [None] * group.world_size
    distributed.all_gather_object(devices, device, group=channel)
    instance, problem = None, None
    told: list[Any] = [None, None, None]
    if group.rank_in_group == 0:
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

    def share(values: list[int]) -> list[int]:
        numbers = torch.tensor(values, dtype=torch.int64)
        distributed.broadcast(numbers, src=first, group=channel)
        return [int(number) for number in numbers.tolist()]

    def largest(value: int) -> int:
        number = torch.tensor([value], dtype=torch.int64)
        distributed.all_reduce(number, op=distributed.ReduceOp.MAX, group=channel)
        return int(number)

    return Ranks(
        instance,
        seats[group.rank_in_group],
        capacity_bytes,
        share,
        largest,
        num_idle_turns=num_idle_turns,
    )
