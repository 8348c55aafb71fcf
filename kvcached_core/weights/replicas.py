"""Replicas of a rank's weights on the devices of this host: how it finds them, and they find it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path

from kvcached_core.memory.vmm.backend import Handle, SharingBackend
from kvcached_core.weights.exporting import Exporting, Wish, export_pages, sockets_of
from kvcached_core.weights.importing import Replica, connect


class Replicas:
    """Where a rank has pages from, and who has pages from it. The worker's thread calls it.

    Attributes:
        backend: Of the image; what it creates others may map.

    Args:
        backend: See there.
        folder: That of the host copies.
    """

    def __init__(self, backend: SharingBackend, folder: Path) -> None:
        self.backend = backend
        self._folder = folder
        self._exporting: Exporting | None = None

    def export(self, digest: str, find: Callable[[Wish], list[Handle]]) -> None:
        """Let others have pages from now on. Any thread may call it, once.

        Args:
            digest: That of the key of the weights.
            find: See `Exporting`.
        """
        self._exporting = export_pages(self._folder, digest, self.backend, find)

    def unread(self) -> AbstractContextManager[None]:
        """Wait until no replica reads, and let none begin meanwhile."""
        return nullcontext() if self._exporting is None else self._exporting.unread()

    def fetch(self, wish: Wish, take: Callable[[Replica, Wish], int]) -> None:
        """Have pages from one replica after another, until all came or none has more.

        Args:
            wish: The pages that are wanted.
            take: Has pages from a replica, and returns how many of the first have come.

        Raises:
            BackendError: If the backend fails.
        """
        own = None if self._exporting is None else self._exporting.path
        for path in sockets_of(self._folder, wish.digest) if wish.sums else ():
            line = None if path == own else connect(path)
            if line is None:
                continue
            with closing(Replica(line, self.backend, wish)) as replica:
                wish = wish.behind(take(replica, wish))
            if not wish.sums:
                return

    def close(self) -> None:
        """Let nobody have pages any more."""
        if self._exporting is not None:
            self._exporting.close()
