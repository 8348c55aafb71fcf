"""How much of a process its engine takes off the device in a sleep: what a wake will allocate."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class SavedMemory:
    """What an engine allocates in regions that it may release and resume, in bytes, by tag.

    The thread of the worker calls it.

    Args:
        reserved_bytes: Returns what torch's allocator has of the device for this process.
    """

    def __init__(self, reserved_bytes: Callable[[], int]) -> None:
        self._reserved_bytes = reserved_bytes
        self._bytes: Counter[str] = Counter()

    @contextmanager
    def measured(self, tag: str, region: AbstractContextManager[Any]) -> Iterator[Any]:
        """Run a region, and count what was allocated in it."""
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
