"""The leases of one model: who holds one now, and when the last comes back."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from kvcached_gateway.lease import Address, Ending, HowToClose, Woken

__all__ = ["CLOSE_SECONDS", "HeldLeases", "ModelLease"]

CLOSE_SECONDS = 1.0


@dataclass(eq=False)
class ModelLease:
    """A lease on a model's engine; see `lease.Lease`.

    Attributes:
        adapter: The adapter that it is for, or None.
        is_held: Whether it counts; not any more when it ended, or its engine did.
        has_first_byte: Whether the engine has begun to answer.
        is_closed: Whether it may not begin to any more.
    """

    model_id: str
    address: Address
    woken: Woken
    waited_seconds: float
    adapter: str | None = None
    is_held: bool = True
    has_first_byte: bool = False
    is_closed: bool = False
    _close_there: HowToClose | None = None
    _changed: Callable[["ModelLease", Ending | None], None] = field(
        default=lambda _lease, _ending: None, repr=False
    )

    def first_byte(self) -> bool:
        """See `Lease.first_byte`."""
        if self.is_closed:
            return False
        if self.is_held and not self.has_first_byte:
            self.has_first_byte = True
            self._changed(self, None)
        return True

    def held_by(self, close: HowToClose) -> None:
        """See `Lease.held_by`."""
        self._close_there = close

    def close(self) -> Coroutine[Any, Any, None] | None:
        """Let no answer begin any more; one that has goes on.

        Returns:
            What does it where another process passes the answer on.
        """
        if self._close_there is not None and not self.has_first_byte:
            return self._close_elsewhere(self._close_there)
        self.is_closed = not self.has_first_byte
        return None

    async def _close_elsewhere(self, close: HowToClose) -> None:
        await close()
        self.is_closed = not self.has_first_byte

    def end(self, ending: Ending, *, status: int = 0) -> None:
        """See `Lease.end`."""
        del status
        if self.is_held:
            self.is_held = False
            self._changed(self, ending)


class HeldLeases:
    """The leases that count.

    Args:
        changed: Called when one began to be answered, or ended, with how it did.
    """

    def __init__(self, changed: Callable[[ModelLease, Ending | None], None]) -> None:
        self._changed = changed
        self._held: set[ModelLease] = set()
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        """Return how many are held."""
        return len(self._held)

    @property
    def have_begun(self) -> bool:
        """Whether one of them has been answered in part."""
        return any(lease.has_first_byte for lease in self._held)

    @property
    def are_waiting(self) -> bool:
        """Whether one of them has not been answered at all."""
        return any(not lease.has_first_byte for lease in self._held)

    def give(
        self,
        model_id: str,
        address: Address,
        woken: Woken,
        waited_seconds: float,
        adapter: str | None,
    ) -> ModelLease:
        """Return a new one."""
        lease = ModelLease(
            model_id, address, woken, waited_seconds, adapter, _changed=self._on_change
        )
        self._held.add(lease)
        self._none.clear()
        return lease

    def num_of(self, adapter: str) -> int:
        """Return how many are for an adapter."""
        return sum(lease.adapter == adapter for lease in self._held)

    def revoke(self) -> None:
        """Count none any more: their engine is gone, and whoever holds one will see that."""
        for lease in self._held:
            lease.is_held = False
            lease.is_closed = not lease.has_first_byte
        self._held.clear()
        self._none.set()

    async def close(self) -> bool:
        """Let no answer begin any more, and return whether none has; those that have go on.

        Another process that does not say within `CLOSE_SECONDS` whether one has may have begun it.
        """
        closing = [one for lease in self._held if (one := lease.close()) is not None]
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.gather(*closing)
        except TimeoutError:
            return False
        return not self.have_begun

    async def returned(self) -> None:
        """Wait until none is held."""
        await self._none.wait()

    def _on_change(self, lease: ModelLease, ending: Ending | None) -> None:
        if ending is not None:
            self._held.discard(lease)
            if not self._held:
                self._none.set()
        self._changed(lease, ending)
