"""One shared host copy: `<key>.image`, and `<key>.json` that says when it may be believed.

Who fills a copy has the image locked for itself; who uses one shares that lock. The record is
written last and renamed into place, so an image without one is nobody's, or of somebody who was
ended while filling it. The kernel drops the locks of who is ended.
"""

import errno
import json
import logging
import os
import stat
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from kvcached_core.errors import HostCopyError
from kvcached_core.ledger.forks import disown_in_children
from kvcached_core.ledger.lock import drop_byte, hold_byte, take_byte
from kvcached_core.weights.copies_folder import (
    IMAGE,
    RECORD,
    STAT_BLOCK_BYTES,
    WHOLE,
    copies_folder,
    is_current,
)
from kvcached_core.weights.record import PageSums, Shape, believed, say_used, words_of, write_record

_LOOK_SECONDS = 0.05

logger = logging.getLogger("kvcached")


class SharedFile:
    """An open image with its lock.

    Attributes:
        path: The image.
        fd: Its descriptor, which has the lock.
        sums: Of each page on the device, as the record says; None: this process alone has it, and
            fills it.
        checksums: Of each page in the image, as the record says.
    """

    def __init__(
        self,
        shape: Shape,
        path: Path,
        fd: int,
        sums: list[PageSums] | None = None,
        checksums: Sequence[int] = (),
    ) -> None:
        self.path, self.fd = path, fd
        self.sums, self.checksums = sums, checksums
        self._shape = shape
        self._record = path.with_suffix(RECORD)
        disown_in_children(self)

    def allocate(self) -> None:
        """Give the image its length, if there is room for all of it.

        Raises:
            OSError: If there is not. Nothing was taken then: a system that is full harms others.
        """
        found, around = os.fstat(self.fd), os.fstatvfs(self.fd)
        missing = self._shape.num_bytes - STAT_BLOCK_BYTES * found.st_blocks
        if missing > around.f_bavail * around.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(self.fd, self._shape.num_bytes)

    def reserve(self) -> None:
        """Let the file's system promise every byte, so that no write can end this process.

        Raises:
            OSError: If it has no room.
        """
        page_bytes = self._shape.page_bytes
        for page in range(self._shape.num_pages):  # one call for all could not be ended
            os.posix_fallocate(self.fd, page * page_bytes, page_bytes)

    def publish(
        self, sums: list[PageSums], checksums: list[int], shape: Shape | None = None
    ) -> None:
        """Say that every page is there, and let other processes use them.

        Args:
            sums: Of each page, as the device has it.
            checksums: Of each page, as the image has it.
            shape: What it says of the model, where that is not what was asked for.

        Raises:
            OSError: If that cannot be written down; the file stays this process's own.
        """
        if not is_current(self.fd, self.path):
            raise FileNotFoundError(errno.ENOENT, "somebody removed it")
        write_record(self._record, words_of(shape or self._shape, sums, checksums))
        self.sums = sums
        hold_byte(self.fd, WHOLE)

    def say_used(self) -> None:
        """Note that the image is read now."""
        say_used(self._record)

    def distrust(self) -> None:
        """Let no start have its weights from here; the file is what it was for all else."""
        with suppress(OSError, ValueError):
            write_record(self._record, json.loads(self._record.read_bytes()) | {"loaded": None})

    def start_over(self) -> bool:
        """Return whether this process alone has the file; then nothing of it is believed any more.

        Otherwise it stays as it is, and this process goes on sharing it.
        """
        if not is_current(self.fd, self.path) or not take_byte(self.fd, WHOLE):
            return False
        self._record.unlink(missing_ok=True)
        self.sums = None
        return True

    def discard(self) -> None:
        """Remove the image, which this process alone has, and close it."""
        if is_current(self.fd, self.path):
            self._record.unlink(missing_ok=True)
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Give the lock back. A finished image stays, for the next start; any other one goes."""
        if self.fd < 0:
            return
        if self.sums is None and is_current(self.fd, self.path):
            self.path.unlink()
        say_used(self._record)
        drop_byte(self.fd, WHOLE)  # closing does not do it while a forked child has it open, too
        os.close(self.fd)
        self.fd = -1

    def disown(self) -> None:
        """Close the file in a forked child; its lock stays its parent's."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_shared(folder: Path, shape: Shape, stop: threading.Event) -> SharedFile | None:
    """Open the shared image of a shape, finished or to be filled by this process alone.

    While another process fills it this waits; if that one is ended, this one has it.

    Args:
        folder: Where images lie; it is made if it is missing.
        shape: What the image has to hold.
        stop: Set when nobody wants it any more.

    Returns:
        The open file, or None after `stop`.

    Raises:
        HostCopyError: If there is something that cannot be used and must not be replaced.
    """
    path = copies_folder(folder) / f"{shape.key.digest}{IMAGE}"
    is_waiting = False
    while not stop.is_set():
        fd = _open(path)
        try:
            is_alone = take_byte(fd, WHOLE)
            if is_alone or _share(fd):
                if is_current(fd, path):
                    return _checked(shape, path, fd, is_alone=is_alone)
                os.close(fd)
                continue
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if not is_waiting:
            logger.info("kvcached: another process fills %s; waiting for it", path)
            is_waiting = True
        stop.wait(_LOOK_SECONDS)
    return None


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_CREAT, 0o600)
    except OSError as error:
        raise HostCopyError(f"{path} cannot be opened: {error.strerror}") from error
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise HostCopyError(f"{path} is not a file of this user")
    return fd


def _share(fd: int) -> bool:
    """Return whether nobody fills the image."""
    try:
        hold_byte(fd, WHOLE)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def _checked(shape: Shape, path: Path, fd: int, *, is_alone: bool) -> SharedFile:
    record = path.with_suffix(RECORD)
    sums, checksums, problem = believed(shape, record, os.fstat(fd).st_size)
    if problem:
        if not is_alone:
            raise HostCopyError(f"{path} is in use although {problem}")
        if os.fstat(fd).st_size or record.exists():
            logger.warning("kvcached: the host copy %s is filled again: %s", path, problem)
        record.unlink(missing_ok=True)
        if os.fstat(fd).st_size:
            os.ftruncate(fd, 0)  # what it held must not count beside the claim to fill it
        return SharedFile(shape, path, fd)
    if is_alone:
        hold_byte(fd, WHOLE)
    say_used(record)
    return SharedFile(shape, path, fd, sums, checksums)
