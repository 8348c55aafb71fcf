"""One image of weights on a disk: opened with a shared lock, read back, and compared.

It has the name, the record and the lock of a shared copy in host memory. Who writes one does that
under another name, which is given up for its own when all of it is on the disk.
"""

import logging
import os
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from kvcached_core.errors import DiskImageError
from kvcached_core.ledger.lock import drop_byte, hold_byte
from kvcached_core.weights.copies_folder import (
    IMAGE,
    RECORD,
    WHOLE,
    is_current,
    remove_unused,
)
from kvcached_core.weights.direct_file import DirectFile
from kvcached_core.weights.host_bytes import HostBytes
from kvcached_core.weights.record import PageSums, Shape, believed, read_words, say_used

_LOOK_SECONDS, _NUM_LOOKS = 0.05, 200

logger = logging.getLogger("kvcached")


class DiskImage:
    """A whole image on a disk, which nobody removes while this is open.

    Attributes:
        path: The file.
        shape: What it holds, with what the model is with these weights.
        sums: Of each page, as the device had it.
        checksums: Of each page, as the file has it.
    """

    def __init__(
        self, shape: Shape, file: DirectFile, sums: Sequence[PageSums], checksums: Sequence[int]
    ) -> None:
        self.path = file.path
        self.shape, self.sums, self.checksums = shape, list(sums), list(checksums)
        self._file = file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(
        self, whole: HostBytes, stop: threading.Event, cpus: Collection[int] = ()
    ) -> list[int]:
        """Read all pages to host memory; return which of them are not what the record is of.

        Nothing is known of them after `stop` is set.

        Args:
            whole: Where they go; it is touched meanwhile.
            stop: Set when nobody wants them any more.
            cpus: The processors near the device; memory is taken near them.

        Raises:
            DiskImageError: If the disk fails.
            OSError: If the host has no memory.
        """

        def read(address: int, num_bytes: int, offset: int) -> None:
            try:
                self._file.read(address, num_bytes, offset)
            except OSError as error:
                raise DiskImageError(f"{self.path} cannot be read: {error.strerror}") from error

        found = whole.fill(read, stop, cpus)
        pages = zip(found, self.checksums, strict=True)
        return [page for page, (is_now, was) in enumerate(pages) if is_now != was]

    def remove(self) -> None:
        """Close it, and remove it unless others have it open."""
        self.close()
        remove_unused(self.path)

    def close(self) -> None:
        """Give its lock back; the file stays."""
        if self._file.fd >= 0:
            say_used(self.path.with_suffix(RECORD))
            drop_byte(self._file.fd, WHOLE)  # a forked child may have it open, too
            self._file.close()


def open_image(folder: Path, shape: Shape, stop: threading.Event) -> DiskImage | None:
    """Return the image of a shape if it is there and whole.

    While another process puts it there or removes it this waits.

    Args:
        folder: Where images lie; it may be missing.
        shape: What it has to hold.
        stop: Set when nobody wants it any more.
    """
    path = folder / f"{shape.key.digest}{IMAGE}"
    for _ in range(_NUM_LOOKS):
        try:
            file = DirectFile(path, os.O_RDWR)
        except OSError:
            return None  # there is none, or none of ours
        try:
            if not _share(file.fd):
                file.close()
            elif is_current(file.fd, path):
                return _checked(shape, file)
        except BaseException:
            file.close()
            raise
        file.close()
        if stop.wait(_LOOK_SECONDS):
            break
    return None


def _share(fd: int) -> bool:
    try:
        hold_byte(fd, WHOLE)
    except OSError:
        return False
    return True


def _checked(shape: Shape, file: DirectFile) -> DiskImage | None:
    record = file.path.with_suffix(RECORD)
    sums, checksums, problem = believed(shape, record, os.fstat(file.fd).st_size)
    found = read_words(record)
    if sums is None or found is None:
        with suppress(OSError):
            drop_byte(file.fd, WHOLE)
        file.close()
        logger.warning("kvcached: the image %s is not used: %s", file.path, problem or "no record")
        return None
    say_used(record)
    return DiskImage(found[0], file, sums, checksums)
