"""SGLang's HiCache: which of it is served, and what it takes of the host."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from kvcached_sglang.parallel import num_alike

SETTING = "--hicache-size"
SETTING_BYTES = 10**9  # SGLang counts it so, for each rank

# What lies below the host's memory. All of SGLang's read and write host memory alone; these ran.
# `dynamic` is a class that the user names.
SERVED_STORAGE = ("file", "dynamic")
SERVED_BACKENDS = ("direct", "kernel")
# Where a block of a layer is, in the host's memory, as these back-ends copy it.
SERVED_LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
# Whether blocks stay in the host's memory, or only pass through it on their way to the storage.
SERVED_MODES = ("cache", "buffer_only")

# What SGLang calls its host pools: those with rows of their own, and those of drafts, whose rows
# have the numbers of the target's.
KEYS, WINDOW, STATES = "kv", "swa", "mamba"
DRAFTS = ("draft", "draft_indexer")

# A module of the first release whose host tier may be smaller than the device's pool.
_FIRST_MODULE = "sglang.srt.mem_cache.unified_memory_pool"

# One of releases (0.5.18 on) whose controller of several pools begins its copies by the methods of
# the controller of one. Older ones have others, which we do not see.
_TRANSFERS_MODULE = "sglang.srt.mem_cache.l2_transfer"

# One of releases (0.5.19 on) that read the size where it can be changed when a server has started.
_CONTEXT_MODULE = "sglang.srt.arg_groups.hicache_hook"

# SGLang's multiples where none is set, by whether blocks stay in the host's memory.
RATIO, BUFFER_RATIO = 2.0, 1.2

# SGLang's part of the host's memory to which it would lower such a multiple.
FRACTION = "hicache_host_memory_fraction"

_REMOVE = "or remove --enable-hierarchical-cache"


def is_offloading(arguments: Any) -> bool:
    """Return whether a server of these arguments copies blocks to the host."""
    return bool(getattr(arguments, "enable_hierarchical_cache", False))


def has_tier_of_pools() -> bool:
    """Return whether we see what this release copies of sliding windows and states."""
    return find_spec(_TRANSFERS_MODULE) is not None


def size_tier(arguments: Any, cache_bytes: int) -> int:
    """Return the host memory that all ranks of an instance take for copies together, in bytes.

    Where SGLang would take a multiple of its pool, whose ids no memory is behind, it is told to
    take that of what a rank believes to have.

    Args:
        arguments: A `ServerArgs`.
        cache_bytes: What each rank believes to have for its KV cache.
    """
    if arguments.hicache_size > 0:
        num_bytes = int(arguments.hicache_size * SETTING_BYTES)
    else:
        num_bytes = int(cache_bytes * _ratio(arguments))
        _tell_size(num_bytes)
    return num_bytes * num_alike(arguments)


def _ratio(arguments: Any) -> float:
    is_buffer = getattr(arguments, "hicache_host_memory_mode", "cache") == "buffer_only"
    return float(arguments.hicache_ratio or (BUFFER_RATIO if is_buffer else RATIO))


def _tell_size(num_bytes: int) -> None:
    from sglang.srt.runtime_context import get_context, get_memory

    changes: dict[str, Any] = {"hicache_size": num_bytes / SETTING_BYTES}
    if hasattr(get_memory(), FRACTION):
        changes[FRACTION] = None  # it would lower the ratio
    get_context().override("kvcached.tier", **changes)


def host_pools(controller: Any) -> Iterator[Any]:
    """Yield the host pools whose rows have the numbers of the keys: those, and the drafts'.

    Args:
        controller: SGLang's HiCache controller.
    """
    pool = controller.mem_pool_host
    anchor = getattr(pool, "anchor_entry", None)  # a group of pools, of which one has the keys
    if anchor is None:
        yield pool
        if getattr(controller, "has_draft", False):  # beside it up to 0.5.15
            yield controller.mem_pool_host_draft
        return
    yield anchor.host_pool
    yield from (each.host_pool for each in pool.entries if str(each.name) in DRAFTS)


def other_host_pools(controller: Any) -> list[Any]:
    """Return the host pools of sliding windows and states, which have rows of their own."""
    entries = getattr(controller.mem_pool_host, "entries", ())
    return [each.host_pool for each in entries if str(each.name) in (WINDOW, STATES)]


def copied_ids(operations: list[Any]) -> dict[str, list[Any]]:
    """Return the ids of the device that copies name, tensors of them by the name of a pool.

    Args:
        operations: Those of SGLang's controller that wait for their start.
    """
    found = {KEYS: [each.device_indices for each in operations if len(each.device_indices)]}
    for operation in operations:
        for transfer in getattr(operation, "pool_transfers", None) or ():
            if transfer.indices_from_pool is None:  # the others have the ids of that pool
                found.setdefault(str(transfer.name), []).append(transfer.device_indices)
    return {name: ids for name, ids in found.items() if ids}


def disk_folders(controller: Any) -> tuple[str, ...]:
    """Return where the tier on disk of a HiCache controller lies now: it may come and go."""
    folder = getattr(controller.storage_backend, "file_path", None)
    return () if folder is None else (str(folder),)


def tier_obstacles(arguments: Any) -> Iterator[str]:
    """Yield why a server's HiCache cannot be served, and what to change.

    Args:
        arguments: What was parsed, or a `ServerArgs`.
    """
    if not is_offloading(arguments):
        return
    if find_spec(_FIRST_MODULE) is None:
        yield (
            "HiCache: this release wants a host tier larger than the device's pool, which is "
            f"virtual here; install SGLang 0.5.15 or newer, {_REMOVE}"
        )
        return
    if getattr(arguments, "hicache_size", 0) <= 0 and find_spec(_CONTEXT_MODULE) is None:
        yield (
            "HiCache: this release takes --hicache-ratio as a part of the device's pool, which is "
            "virtual here; set --hicache-size to the GB of host memory that each rank shall take, "
            f"install SGLang 0.5.19 or newer, {_REMOVE}"
        )
    for name, served, word in (
        ("hicache_storage_backend", SERVED_STORAGE, "storage backend"),
        ("hicache_io_backend", SERVED_BACKENDS, "IO backend"),
        ("hicache_mem_layout", SERVED_LAYOUTS, "memory layout"),
        ("hicache_host_memory_mode", SERVED_MODES, "host memory mode"),
    ):
        value = getattr(arguments, name, None)
        if value is not None and value not in served:
            flag = f"--{name.replace('_', '-')}"
            yield (
                f"HiCache {word} {value}: nobody has tried it; set {flag} to "
                f"{' or '.join(served)}, {_REMOVE}"
            )
