"""What happens, told to whoever listens: transitions of models and decisions, as they come."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Event", "Events"]

Event = dict[str, Any]
MAX_BEHIND = 1000  # a listener that is further behind is let go: it has lost the thread anyway


class Events:
    """Listeners and what they have not heard yet; used on the loop's thread."""

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[Event | None]] = set()

    def publish(self, event: Event) -> None:
        """Tell everybody who listens; it does not wait for them."""
        for listener in list(self._listeners):
            if listener.qsize() >= MAX_BEHIND:
                self._listeners.discard(listener)
                listener.put_nowait(None)
            else:
                listener.put_nowait(event)

    def close(self) -> None:
        """Tell everybody that nothing more comes."""
        for listener in self._listeners:
            listener.put_nowait(None)
        self._listeners.clear()

    @contextmanager
    def listen(self) -> Iterator["asyncio.Queue[Event | None]"]:
        """Give a queue of what happens from now on; None is the end."""
        listener: asyncio.Queue[Event | None] = asyncio.Queue()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
