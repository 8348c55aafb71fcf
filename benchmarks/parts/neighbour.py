"""A row of this process in a ledger: an instance that wants memory and never maps it."""

import threading
import time

from kvcached_core.ledger.bell import Doorbell
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import doorbell_path
from kvcached_core.ledger.shortage import ask_peers

# As an engine that waits does.
LOOK_SECONDS = 0.05


class Neighbour:
    """An instance of this process that wants memory.

    Args:
        ledger: The device's.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.row = ledger.register(name="neighbour", engine="benchmark")
        self.rang = threading.Event()
        self.bell = Doorbell(doorbell_path(ledger.path, self.row), self.rang.set)

    def take(self, num_bytes: int, page_bytes: int) -> tuple[float, float]:
        """Take `num_bytes`; return after how many ms the first page came, and all of it."""
        granted, first_ms = 0, 0.0
        start = time.perf_counter()
        while granted < num_bytes:
            self.rang.clear()
            more = self.ledger.promise(self.row, num_bytes - granted, page_bytes)
            granted += more
            if more and not first_ms:
                first_ms = (time.perf_counter() - start) * 1e3
            if granted < num_bytes:
                ask_peers(self.ledger, self.row, num_bytes - granted)
                self.rang.wait(LOOK_SECONDS)
        return first_ms, (time.perf_counter() - start) * 1e3

    @property
    def room_bytes(self) -> int:
        """What it could be promised without anybody giving anything."""
        return max(self.ledger.free_bytes(self.row), 0)

    def close(self) -> None:
        """Leave the ledger."""
        self.bell.close()
        self.ledger.unregister(self.row)
