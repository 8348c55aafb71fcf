"""Pages of a rank's weights for replicas of it: a socket beside the host copies, and a hold.

Who wants pages connects, and says which, with the sums that they have to have. It gets a descriptor
of each, up to the first that is not here or not the same. Until it hangs up, no page goes. One is
served at a time; who comes meanwhile has the host's copy.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kvcached_core.errors import BackendError, HostCopyError
from kvcached_core.ledger.forks import disown_in_children
from kvcached_core.memory.vmm.backend import Handle, SharingBackend
from kvcached_core.weights.copies_folder import copies_folder
from kvcached_core.weights.record import PageSums

SOCKET, _NEW = ".pages", ".begun"
# Pages that one message asks for: the kernel passes up to 253 descriptors with one.
BATCH_PAGES = 64
MAX_MESSAGE_BYTES = 1 << 14
# How long pages stay for one reader: some hundred GB over a link between GPUs. Who is slower reads
# on, because what it has imported stays, but nobody keeps it for it any more.
HOLD_SECONDS = 1.0
PAUSE_SECONDS = 0.1
_DIGITS = 12  # of a key, so that the address of a socket is short enough

logger = logging.getLogger("kvcached")


@dataclass(frozen=True)
class Wish:
    """What a reader asks for.

    Attributes:
        digest: That of the key of the weights.
        page_bytes: The size of a page.
        first: The first page.
        sums: Of this page and of those behind it.
    """

    digest: str
    page_bytes: int
    first: int
    sums: Sequence[PageSums]

    def behind(self, num_pages: int) -> "Wish":
        """Return what is left of it behind its first pages."""
        return replace(self, first=self.first + num_pages, sums=self.sums[num_pages:])

    def to_bytes(self) -> bytes:
        """Return it as a message."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def of(cls, message: bytes) -> "Wish":
        """Return what a message says.

        Raises:
            ValueError: If it is something else.
        """
        try:
            found = json.loads(message)
            sums = [(int(rows), int(columns)) for rows, columns in found["sums"]]
            wish = cls(str(found["digest"]), int(found["page_bytes"]), int(found["first"]), sums)
        except (TypeError, KeyError) as error:
            raise ValueError(f"this is no wish: {error!r}") from error
        if wish.first < 0:
            raise ValueError(f"the first page is {wish.first}, allowed are 0 on")
        return wish


def sockets_of(folder: Path, digest: str) -> list[Path]:
    """Return where pages of a key may be asked for."""
    return sorted(folder.glob(f"{digest[:_DIGITS]}-*{SOCKET}"))


class Exporting:
    """The socket, and the thread that answers there. In a forked child it is nobody's.

    Args:
        folder: That of the host copies.
        digest: That of the key of the weights.
        backend: What created their pages.
        find: Returns the memory of the pages of a wish that are here and the same, up to the first
            that is not. It is called in the thread, while none of them goes.

    Raises:
        HostCopyError: If the folder cannot be used.
        OSError: If the socket cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        digest: str,
        backend: SharingBackend,
        find: Callable[[Wish], list[Handle]],
    ) -> None:
        name = f"{digest[:_DIGITS]}-{secrets.token_hex(4)}{SOCKET}"
        self.path = copies_folder(folder) / name
        self._backend, self._find = backend, find
        self._lock, self._num_waiting = threading.Lock(), 0
        self._is_ours = True
        self._reader: socket.socket | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        new = self.path.with_suffix(_NEW)
        try:
            self._socket.bind(str(new))
            new.chmod(0o600)
            self._socket.listen()
            new.rename(self.path)  # where nobody listens is removed
        except OSError:
            self._socket.close()
            new.unlink(missing_ok=True)
            raise
        disown_in_children(self)
        self._thread = threading.Thread(target=self._listen, name="kvcached-pages", daemon=True)
        self._thread.start()

    @contextmanager
    def unread(self) -> Iterator[None]:
        """Wait until nobody reads, and let nobody begin meanwhile."""
        self._num_waiting += 1
        try:
            with self._lock:
                yield
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        """Let nobody begin any more. Who reads reads on: what it has imported stays."""
        if not self._is_ours:
            return
        self._is_ours = False
        self.path.unlink(missing_ok=True)
        for end in (self._socket, self._reader):
            if end is not None:
                with suppress(OSError):  # nobody is there any more
                    end.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def disown(self) -> None:
        """Let go of what a forked child inherited; see `forks`."""
        self._is_ours = False
        self._socket.close()
        if self._reader is not None:
            self._reader.close()

    def _listen(self) -> None:
        while True:
            try:
                reader, _ = self._socket.accept()
            except OSError as error:
                if not self._is_ours:
                    return  # it is shut down
                logger.info("kvcached: a replica that came could not be heard: %s", error)
                time.sleep(PAUSE_SECONDS)  # without a descriptor left it fails again at once
                continue
            with reader:
                self._reader = reader
                if self._is_ours and not self._num_waiting:
                    with self._lock:
                        self._serve(reader)
                self._reader = None

    def _serve(self, reader: socket.socket) -> None:
        deadline = time.monotonic() + HOLD_SECONDS
        try:
            while (left_seconds := deadline - time.monotonic()) > 0:
                reader.settimeout(left_seconds)
                message = reader.recv(MAX_MESSAGE_BYTES)
                if not message:
                    return
                self._send(reader, self._find(Wish.of(message)))
        except (OSError, ValueError, BackendError) as error:  # a timeout, too
            logger.info("kvcached: weights are not read on: %s", error)
        except Exception:  # the next one is answered all the same
            logger.exception("kvcached: weights are not read on")

    def _send(self, reader: socket.socket, handles: list[Handle]) -> None:
        fds: list[int] = []
        try:
            for handle in handles:
                fds.append(self._backend.export_handle(handle))  # noqa: PERF401  a failure closes these
            socket.send_fds(reader, [len(fds).to_bytes(2, "little")], fds)
        finally:
            for fd in fds:
                os.close(fd)


def export_pages(
    folder: Path, digest: str, backend: SharingBackend, find: Callable[[Wish], list[Handle]]
) -> Exporting | None:
    """Begin to export; None if that cannot be, which a line in the log says."""
    try:
        return Exporting(folder, digest, backend, find)
    except (HostCopyError, OSError) as error:
        logger.warning("kvcached: no replica can read these weights: %s", error)
        return None
