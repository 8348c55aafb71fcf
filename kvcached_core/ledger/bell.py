"""Being asked for memory: each instance listens on a socket of its own, without polling."""

import atexit
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.forks import disown_in_children
from kvcached_core.ledger.opening import MAX_ADDRESS_BYTES, doorbell_path
from kvcached_core.ledger.store import LedgerStore

logger = logging.getLogger("kvcached")

_RING = b"r"
_STOP = b"s"
_ALARM = b"a"
_AT_ONCE_SECONDS = 1e-3  # a socket with a timeout of 0 would not wait, nor say that time is over


class Doorbell:
    """A datagram socket and a thread that calls back when somebody rings.

    In a forked child it is nobody's: there closing it does nothing.

    Args:
        path: Where the socket lies; an older one there is replaced.
        on_ring: Called in the bell's thread at each ring or alarm, the first time perhaps before
            who makes the bell has it. What it raises is logged, and the bell listens on.

    Raises:
        LedgerError: If the socket cannot be made.
    """

    def __init__(self, path: Path, on_ring: Callable[[], None]) -> None:
        self.path = path
        self._tell = on_ring
        self._deadline: float | None = None
        self._rang_at: float | None = None  # the deadline that was reached last
        self._is_ours = True
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # Connected, it reaches the listener also when the path is gone.
        self._own = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            path.unlink(missing_ok=True)
            self._socket.bind(str(path))
            path.chmod(0o600)
            self._own.connect(str(path))
        except OSError as error:
            self._socket.close()
            self._own.close()
            raise LedgerError(
                f"the socket {path} cannot be made: {error.strerror or error}; set KVCACHED_DIR to "
                f"a folder that this user may write, and whose sockets' addresses are up to "
                f"{MAX_ADDRESS_BYTES} bytes long (this one is {len(os.fsencode(path))})"
            ) from error
        disown_in_children(self)
        self._thread = threading.Thread(target=self._listen, name="kvcached-bell", daemon=True)
        self._thread.start()

    def set_alarm(self, seconds: float) -> None:
        """Ring once in `seconds`; an alarm that is set already is replaced."""
        self._deadline = time.monotonic() + seconds
        self._own.send(_ALARM)

    def close(self) -> None:
        """Stop listening and remove the socket."""
        if not self._is_ours:
            return
        self._is_ours = False
        self._own.send(_STOP)
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._own.close()
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def disown(self) -> None:
        """Let go of what a forked child inherited; see `forks`."""
        self._is_ours = False
        self._own.close()
        self._socket.close()

    def _listen(self) -> None:
        while (message := self._receive()) != _STOP:
            if message == _RING:
                try:
                    self._tell()
                except Exception:
                    logger.exception("kvcached: a ring at %s could not be answered", self.path)

    def _receive(self) -> bytes:
        # Only who sets an alarm writes the deadline, so none is lost that is set while one rings.
        deadline, wait = self._deadline, None
        if deadline is not None and deadline is not self._rang_at:
            wait = max(deadline - time.monotonic(), _AT_ONCE_SECONDS)
        self._socket.settimeout(wait)
        try:
            return self._socket.recv(1)
        except TimeoutError:
            self._rang_at = deadline
            return _RING


# The one socket that this process rings others with; it has no address.
_ringer = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
_ringer.settimeout(0)
atexit.register(_ringer.close)


def wake(ledger: LedgerStore, rows: Iterable[RowKey]) -> None:
    """Wake instances, because others want something of them or have given them memory."""
    for row in rows:
        with suppress(LedgerError):  # a folder of too long a name has no bells
            ring(doorbell_path(ledger.path, row))


def ring(path: Path) -> bool:
    """Wake the instance that listens at `path`; return whether anybody was there."""
    try:
        _ringer.sendto(_RING, os.fspath(path))
    except BlockingIOError:
        return True  # its queue is full of rings that it has not heard yet
    except OSError:
        return False
    return True
