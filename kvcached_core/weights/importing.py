"""A replica of a rank's weights in another process: its pages, mapped here one by one."""

import logging
import os
import socket
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from kvcached_core.errors import BackendError
from kvcached_core.memory.vmm.backend import Handle, SharingBackend
from kvcached_core.weights.exporting import BATCH_PAGES, Wish

# How long a wake waits for an answer, in which the link to host memory brings a third of 15 GiB.
ANSWER_SECONDS = 0.1
_COUNT_BYTES = 2

logger = logging.getLogger("kvcached")


class Replica:
    """Pages of a replica, which stay as they are there while it is open.

    Its content may be anything: who reads it compares sums afterwards.

    Args:
        line: Connected with the replica.
        backend: What maps them here.
        wish: All pages that are wanted.
    """

    def __init__(self, line: socket.socket, backend: SharingBackend, wish: Wish) -> None:
        self._line, self._backend, self._wish = line, backend, wish
        self._num_bytes = len(wish.sums) * wish.page_bytes
        self._address = backend.reserve(self._num_bytes)
        self._handles: list[Handle] = []

    def addresses(self) -> Generator[int]:
        """Yield where each page begins, in turn, up to the first that cannot be had.

        What is read at an address has to be read before `close`.
        """
        wish = self._wish
        for begin in range(0, len(wish.sums), BATCH_PAGES):
            behind = wish.behind(begin)
            part = replace(behind, sums=behind.sums[:BATCH_PAGES])
            fds = self._ask(part)
            try:
                for fd in fds:
                    yield self._map(fd)
            except BackendError as error:
                logger.info("kvcached: pages of a replica cannot be read here: %s", error)
                return
            finally:
                for fd in fds:
                    os.close(fd)
            if len(fds) < len(part.sums):
                return

    def close(self) -> None:
        """Give all pages back, and let the replica have them again.

        Raises:
            BackendError: If the backend fails.
        """
        with ExitStack() as rest:
            rest.callback(self._hang_up)
            rest.callback(self._backend.free, self._address, self._num_bytes)
            for page, handle in enumerate(self._handles):
                rest.callback(self._backend.release, handle)
                rest.callback(self._backend.unmap, self._page_address(page), handle)

    def _ask(self, wish: Wish) -> list[int]:
        try:
            self._line.send(wish.to_bytes())
            flags = socket.MSG_CMSG_CLOEXEC
            _, fds, _, _ = socket.recv_fds(self._line, _COUNT_BYTES, BATCH_PAGES, flags)
        except OSError as error:  # it is gone, or serves another, or has too much to do
            logger.info("kvcached: a replica does not answer: %s", error)
            return []
        return list(fds)

    def _map(self, fd: int) -> int:
        handle = self._backend.import_handle(fd, self._wish.page_bytes)
        address = self._page_address(len(self._handles))
        try:
            self._backend.map(address, handle)
        except BackendError:
            self._backend.release(handle)
            raise
        self._handles.append(handle)
        return address

    def _page_address(self, page: int) -> int:
        return self._address + page * self._wish.page_bytes

    def _hang_up(self) -> None:
        try:
            self._line.shutdown(socket.SHUT_RDWR)  # a forked child may have it open, too
        except OSError:
            pass  # the replica is gone
        finally:
            self._line.close()


def connect(path: Path) -> socket.socket | None:
    """Return a line to the replica that listens at `path`; None if none does, or it is stuck."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.settimeout(ANSWER_SECONDS)
    try:
        line.connect(str(path))
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)  # whoever listened there was ended
    except OSError as error:
        logger.info("kvcached: %s cannot be asked for pages: %s", path, error)
    else:
        return line
    line.close()
    return None
