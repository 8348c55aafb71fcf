"""Starting beside neighbours: room for what an engine allocates before it has a KV cache."""

import logging
import os
import threading

from kvcached_core.config import Config
from kvcached_core.engine.names import numbered_names, safe_name
from kvcached_core.engine.starting import Start, make_room_to_start
from kvcached_core.errors import LedgerError, NameTakenError
from kvcached_core.ledger.bell import Doorbell, wake
from kvcached_core.ledger.expected import START_SECONDS, Patience
from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.opening import doorbell_path
from kvcached_core.ledger.policy import Policy
from kvcached_core.ledger.shortage import PATIENCE_SECONDS, Need
from kvcached_core.memory.devices import Device, open_ledger

logger = logging.getLogger("kvcached")


def warn_of(shortage: object) -> None:
    """Say that a start goes on without the room that it needs."""
    logger.warning("kvcached: %s; the start of this engine goes on", shortage)


class Arrival:
    """A row for `static_bytes`: from `make_room` on nobody else is promised them until its end.

    Args:
        device: Where they will be allocated.
        config: The settings; they name the folder.
        name: The engine's name.
        engine: The engine and its release.
        static_bytes: Weights and what else comes before the KV cache.
        may_yield: Whether these weights will be offered.

    In a child that the process forks it is nobody's: there closing it does nothing.

    Raises:
        LedgerError: If the ledger cannot be used.
    """

    def __init__(
        self,
        device: Device,
        config: Config,
        *,
        name: str,
        engine: str,
        static_bytes: int,
        may_yield: bool = False,
    ) -> None:
        self.static_bytes = static_bytes
        self._start = Start(config.page_bytes, may_yield)
        self._policy = Policy(priority=config.priority)
        self._pid = os.getpid()
        self._ledger = open_ledger(device, config)
        try:
            self._row = self._register(safe_name(name, f"-starting-{self._pid}"), engine)
            self._rang = threading.Event()
            self._bell = Doorbell(doorbell_path(self._ledger.path, self._row), self._rang.set)
        except BaseException:
            self._ledger.close()
            raise

    def make_room(self, patience_seconds: float = PATIENCE_SECONDS) -> bool:
        """Let neighbours give what is missing; return whether there is room now.

        They give idle pages, cached blocks and weights that they offer, never what their requests
        use. It waits for weights that will be offered, and for so many seconds after there are
        none. What is needed stays announced, also where there is no room: the start goes on.
        """
        need = Need(self._ledger, self._row, self.static_bytes)
        patience = Patience(patience_seconds)
        shortage = make_room_to_start([need], self._rang, self._start, patience)
        if shortage is not None:
            warn_of(shortage)
        return shortage is None

    def shrink(self, static_bytes: int) -> None:
        """Announce only `static_bytes` more: the rest is allocated and seen by everybody."""
        wake(self._ledger, self._ledger.announce(self._row, static_bytes))
        if self._start.may_yield:
            self._ledger.expect_weights(self._row, START_SECONDS)

    def close(self) -> None:
        """Take the announcement back: what it was for is allocated, or will not be."""
        if os.getpid() != self._pid:
            return
        self._bell.close()
        try:
            wake(self._ledger, self._ledger.unregister(self._row))
        finally:
            self._ledger.close()

    def _register(self, name: str, engine: str) -> RowKey:
        # In another PID namespace there may be another process with this number.
        for numbered in numbered_names(name):
            try:
                return self._ledger.register(name=numbered, engine=engine, policy=self._policy)
            except NameTakenError:
                continue
        raise LedgerError(f"too many engines named {name!r} start at the same time")
