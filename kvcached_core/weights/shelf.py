"""Host memory that is there before it is needed: claimed, touched and page-locked; it may grow."""

import threading
from collections.abc import Collection

from kvcached_core.errors import HostBudgetError
from kvcached_core.units import format_bytes
from kvcached_core.weights.host_budget import Claim, HostBudget
from kvcached_core.weights.host_bytes import MAX_COPY_BYTES, HostBytes, Pinning, touched


class Shelf:
    """Memory of this process at one address, of the size that was asked for last or more.

    Its size is a multiple of `MAX_COPY_BYTES`, and no such piece lies in two registrations.

    One thread at a time uses it.

    Args:
        name: What it is for, for people.
        budget: What it is claimed from.
        pinning: What page-locks it.
        cpus: The processors near the device; memory is taken near them.
    """

    def __init__(
        self, name: str, budget: HostBudget, pinning: Pinning, cpus: Collection[int] = ()
    ) -> None:
        self._name, self._budget, self._pinning, self._cpus = name, budget, pinning, cpus
        self._claim: Claim | None = None
        self._bytes: HostBytes | None = None

    def room(self, num_bytes: int) -> int:
        """Return the address of at least so many bytes; 0 for none.

        If it has to grow, what was in it is lost, and the address is another one.

        Raises:
            HostCopyError: If the budget or the host has no room; nothing is there then.
        """
        if self._bytes is not None and num_bytes <= self._bytes.num_bytes:
            return self._bytes.address
        self.close()
        if not num_bytes:
            return 0
        whole_bytes = -(-num_bytes // MAX_COPY_BYTES) * MAX_COPY_BYTES
        claim = self._budget.claim(self._name, whole_bytes)
        try:
            taken = touched(whole_bytes, MAX_COPY_BYTES, threading.Event(), self._cpus)
        except OSError as error:
            claim.close()
            raise HostBudgetError(
                f"the host has no {format_bytes(whole_bytes)} for {self._name}, which go "
                f"with its weights: {error.strerror}",
                whole_bytes,
                self._budget.budget_bytes,
            ) from error
        taken.pin(self._pinning, threading.Event())
        self._claim, self._bytes = claim, taken
        return taken.address

    def close(self) -> None:
        """Give it back; no copy may be under way."""
        taken, claim = self._bytes, self._claim
        self._bytes = self._claim = None
        if taken is not None:
            taken.close()
        if claim is not None:
            claim.close()
