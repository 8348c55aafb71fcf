"""Sleep and wake: what vLLM gives and takes beside its KV cache, through its own allocator."""

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from kvcached_core.memory.rank import RankMemory


def bytes_to_wake(
    allocations: Iterable[Any], tags: Collection[str] | None, deferrable: Collection[str] = ()
) -> int:
    """Return what vLLM's allocator will allocate at a wake of `tags`, or of everything, in bytes.

    A release may say which tags are `deferrable`: all others are woken with any.
    """
    return sum(
        int(data.handle[1])  # the device, the size in bytes, the address, the driver's handle
        for data in allocations
        if getattr(data, "is_asleep", True)  # up to 0.24 all of them sleep, or none
        and (not tags or data.tag in tags or (deferrable and data.tag not in deferrable))
    )


def asleep_bytes(_worker: Any, tags: Collection[str] | None) -> int:
    """Return what a wake allocates in this worker's process; `collective_rpc` calls this."""
    from vllm import device_allocator
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.instance
    if allocator is None:  # no sleep mode, or one that works in another way
        return 0
    deferrable = getattr(device_allocator, "DEFERRABLE_TAGS", ())
    return bytes_to_wake(allocator.pointer_to_data.values(), tags, deferrable)


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Let a wake that fails in vLLM's allocator leave everything asleep, as it was.

    A stranger may take the memory behind our back. vLLM would keep what it allocated before, and
    every later wake would allocate it again, which the driver refuses. What another call woke
    already is not allocated again, either.
    """
    from vllm.device_allocator import cumem

    allocator, create_and_map = cumem.CuMemAllocator.instance, cumem.create_and_map
    if allocator is None:
        yield
        return

    def create_once(handle: Any) -> None:
        data = allocator.pointer_to_data[handle[2]]
        if getattr(data, "is_asleep", True):
            create_and_map(handle)
            undo.callback(put_back, data, data.cpu_backup_tensor)

    def put_back(data: Any, backup: Any) -> None:
        cumem.unmap_and_release(data.handle)
        data.cpu_backup_tensor = backup
        data.is_asleep = True

    cumem.create_and_map = create_once
    with contextlib.ExitStack() as undo:
        try:
            yield
            undo.pop_all()
        finally:
            cumem.create_and_map = create_and_map


@contextlib.contextmanager
def mapped_only(runner: Any, memory: RankMemory) -> Iterator[None]:
    """Let vLLM's wake zero the KV pages that are mapped, not the whole reserved range.

    Up to 0.28 the V1 runner of a quantised KV cache fills all of `kv_caches` with zeros.
    """
    if not hasattr(runner, "init_fp8_kv_scales"):
        yield
        return
    kv_caches, runner.kv_caches = runner.kv_caches, []
    try:
        yield
    finally:
        runner.kv_caches = kv_caches
    memory.zero()
