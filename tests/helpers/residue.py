"""What torch holds in a worker, written to a file by the worker itself."""

import gc
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Segment = Mapping[str, Any]
# torch's own pool; each of CUDA's graphs has another.
DEFAULT_POOL = (0, 0)
NUM_LARGEST = 40
NUM_FRAMES = 5  # of the place where a block was allocated, the last call first


def write(path: Path) -> None:
    """Write what this process holds of the device; the file is there when it is complete."""
    import torch

    segments, names = list[Segment](), dict[int, str]()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        segments = torch.cuda.memory_snapshot()
        names = tensor_names()
    spans, annex = annexes()
    report = {
        "pid": os.getpid(),
        **by_pool(one for one in segments if one.get("address") not in spans),
        **annex,
        "largest": largest(segments, names),
        "pinned": pinned(segments, names),
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report))
    partial.rename(path)


def annexes() -> tuple[dict[int, int], dict[str, Any]]:
    """Return the spans of this process's annexes, and what these are in bytes."""
    from kvcached_core.weights.annex import Annex

    found = [one for one in gc.get_objects() if issubclass(type(one), Annex)]
    spans = [span for one in found for span in one._spans.values()]
    kept = sum((last - first) for span in spans for first, last, _ in span.kept)
    units = {one._unit_bytes for one in found}
    return {span.address: span.num_bytes for span in spans}, {
        "annex_bytes": sum(one.num_bytes for one in found),
        "annex_resident_bytes": sum(one.resident_bytes for one in found),
        "annex_kept_bytes": kept * max(units, default=0),
        "annex_spans": [[span.num_bytes, type(span.tenant).__name__] for span in spans],
    }


def by_pool(segments: Iterable[Segment]) -> dict[str, int]:
    """Return the bytes that are in use, in torch's own pool and in those of graphs, and the rest.

    Args:
        segments: As `torch.cuda.memory_snapshot` returns them.
    """
    found = {"in_use_bytes": 0, "graphs_bytes": 0, "cached_bytes": 0}
    for segment in segments:
        is_own = tuple(segment["segment_pool_id"]) == DEFAULT_POOL
        used, total = segment["allocated_size"], segment["total_size"]
        # A graph's memory is not given back while the graph is there, used or not.
        found["in_use_bytes" if is_own else "graphs_bytes"] += used if is_own else total
        found["cached_bytes"] += total - used if is_own else 0
    return found


def largest(segments: Iterable[Segment], names: Mapping[int, str]) -> list[list[Any]]:
    """Return the blocks that take the most: bytes, how many are alike, the pool and what it is.

    Args:
        segments: As `torch.cuda.memory_snapshot` returns them.
        names: What tensors are, by the addresses of their storages.
    """
    sizes: Counter[tuple[str, str]] = Counter()
    numbers: Counter[tuple[str, str]] = Counter()
    for segment in segments:
        pool = "own" if tuple(segment["segment_pool_id"]) == DEFAULT_POOL else "graphs"
        for block in segment["blocks"]:
            if block["state"] == "inactive":
                continue
            kind = (pool, name_of(block, names))
            sizes[kind] += block["size"]
            numbers[kind] += 1
    return [[size, numbers[kind], *kind] for kind, size in sizes.most_common(NUM_LARGEST)]


def pinned(segments: Iterable[Segment], names: Mapping[int, str]) -> list[list[Any]]:
    """Return torch's own memory that nothing uses and that stays: it lies beside what is used.

    Returns:
        For each such segment the unused bytes, all of them, and what is the most that is used.
    """
    found = list[list[Any]]()
    for segment in segments:
        total, unused = segment["total_size"], segment["total_size"] - segment["allocated_size"]
        used = [block for block in segment["blocks"] if block["state"] != "inactive"]
        if tuple(segment["segment_pool_id"]) == DEFAULT_POOL and unused and used:
            most = max(used, key=lambda block: block["size"])
            found.append([unused, total, name_of(most, names)])
    return sorted(found, key=lambda row: -row[0])[:NUM_LARGEST]


def name_of(block: Mapping[str, Any], names: Mapping[int, str]) -> str:
    """Return what a block is, and where it was allocated if torch has noted that."""
    name = names.get(block["address"], f"? of {block['size']} bytes")
    places = [
        f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}"
        for frame in block.get("frames", ())
        if "/torch/" not in frame["filename"] and "??" not in frame["filename"]
    ]
    return " < ".join([name, *places[:NUM_FRAMES]])


def tensor_names() -> dict[int, str]:
    """Return type and shape of the device's tensors that Python knows, by storage address."""
    import torch

    names: dict[int, str] = {}
    gc.unfreeze()  # vLLM hides from it what was there when it had started
    for one in gc.get_objects():
        if not issubclass(type(one), torch.Tensor):
            continue
        try:
            if one.is_cuda:
                names[one.untyped_storage().data_ptr()] = f"{one.dtype} {list(one.shape)}"
        except Exception:  # noqa: BLE001, S112  one that only pretends to be a tensor
            continue
    return names
