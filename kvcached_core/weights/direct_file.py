"""A file that is read and written beside the page cache, in large blocks, several at a time.

What goes through the page cache would take the host memory that an image on disk shall spare.
"""

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Self

from kvcached_core.ledger.forks import disown_in_children
from kvcached_core.units import MIB

# One request to the disk. Pages are larger, and several of them are under way at a time.
BLOCK_BYTES = 16 * MIB
ALIGNMENT_BYTES = mmap.PAGESIZE  # of places in a file and of addresses; no disk asks for more
# What a file system says that does not know O_DIRECT, some of them when the file is read.
_UNKNOWN = (errno.EINVAL, errno.EOPNOTSUPP)

logger = logging.getLogger("kvcached")
_said: set[int] = set()  # file systems of which it was said


class DirectFile:
    """An open file of an image. Any thread may read and write parts of it.

    Where its file system knows no O_DIRECT, the page cache is used and emptied again, and one line
    of the log says so.

    Args:
        path: The file.
        flags: How it is opened, beside O_DIRECT.

    Attributes:
        fd: Its descriptor; negative once it was closed.
        is_direct: Whether it goes beside the page cache.

    Raises:
        OSError: If it cannot be opened.
    """

    def __init__(self, path: Path, flags: int) -> None:
        self.path = path
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW
        self.is_direct = True
        try:
            self.fd = os.open(path, flags | os.O_DIRECT, 0o600)
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
            self.fd = os.open(path, flags & ~os.O_EXCL, 0o600)
            self._use_cache()
        disown_in_children(self)

    def read(self, address: int, num_bytes: int, offset: int) -> None:
        """Read a part of the file to `address`; return when it is there.

        Raises:
            OSError: If it cannot be read, or the file ends before.
        """
        self._move(os.preadv, address, num_bytes, offset)

    def write(self, address: int, num_bytes: int, offset: int) -> None:
        """Write what is at `address` to a part of the file.

        Raises:
            OSError: If it cannot be written.
        """
        self._move(os.pwritev, address, num_bytes, offset)

    def close(self) -> None:
        """Close it, and give its locks back; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    disown = close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _move(
        self,
        call: Callable[[int, list[memoryview], int], int],
        address: int,
        num_bytes: int,
        offset: int,
    ) -> None:
        if (offset | address | num_bytes) % ALIGNMENT_BYTES and self.is_direct:
            self._use_cache()
        whole = memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")
        done = 0
        while done < num_bytes:
            block = whole[done : done + BLOCK_BYTES]
            try:
                moved = call(self.fd, [block], offset + done)
            except OSError as error:
                if not self.is_direct or error.errno not in _UNKNOWN:
                    raise
                self._use_cache()
                continue
            if not moved:
                raise OSError(errno.EIO, f"it ends after {offset + done} bytes")
            done += moved
        if not self.is_direct:
            if call is os.pwritev:
                os.fdatasync(self.fd)  # what is not on the disk yet stays in the cache
            os.posix_fadvise(self.fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def _use_cache(self) -> None:
        self.is_direct = False
        fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        system = os.fstat(self.fd).st_dev
        if system not in _said:
            _said.add(system)
            logger.warning(
                "kvcached: the file system of %s knows no O_DIRECT: images of weights go through "
                "the page cache, which may be slower, and takes host memory meanwhile",
                self.path.parent,
            )


def knows_direct(folder: Path) -> bool:
    """Return whether files of a folder can be read beside the page cache.

    Raises:
        OSError: If nothing can be written there.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        file.write(bytes(ALIGNMENT_BYTES))
        file.flush()
        with mmap.mmap(-1, ALIGNMENT_BYTES) as room:
            try:
                fd = os.open(file.name, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                try:
                    return os.preadv(fd, [room], 0) == ALIGNMENT_BYTES
                finally:
                    os.close(fd)
            except OSError as error:
                if error.errno not in _UNKNOWN:
                    raise
                return False
