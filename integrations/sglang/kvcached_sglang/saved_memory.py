"""How much of a process lies in SGLang's memory saver: what a wake will allocate."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

KV_CACHE, WEIGHTS, CUDA_GRAPH = "kv_cache", "weights", "cuda_graph"
ALL_TAGS = (KV_CACHE, WEIGHTS, CUDA_GRAPH)


class SavedMemory:
    """What of this process lies in SGLang's memory saver, in bytes, by tag.

    Args:
        reserved_bytes: Returns what torch's allocator has of the device for this process.
    """

    def __init__(self, reserved_bytes: Callable[[], int]) -> None:
        self._reserved_bytes = reserved_bytes
        self._bytes: Counter[str] = Counter()

    @contextmanager
    def measured(self, tag: str, region: AbstractContextManager[Any]) -> Iterator[Any]:
        """Run a region of the saver, and count what was allocated in it."""
        before = self._reserved_bytes()
        with region as inner:
            yield inner
        self._bytes[tag] += max(self._reserved_bytes() - before, 0)

    def at_least(self, tag: str, num_bytes: int) -> None:
        """Say what a tag holds at least: torch may have let go of other memory meanwhile."""
        self._bytes[tag] = max(self._bytes[tag], num_bytes)

    def bytes_of(self, tags: Iterable[str]) -> int:
        """Return what comes back with `tags`."""
        return sum(self._bytes[tag] for tag in tags)


def reserved_bytes() -> int:
    """Return what torch's allocator has of this process's GPU, in bytes."""
    import torch

    return int(torch.cuda.memory_reserved())
