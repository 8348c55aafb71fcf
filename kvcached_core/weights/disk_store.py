"""The folder of images on a disk: what goes there, what finds room, and what was moved.

An image that host memory has no room for is written under a name of its own, made durable, and
then gets its name, and its record last. Its place in host memory is given up after that alone. So
whoever is killed, and whenever, one of the two is whole.
"""

import errno
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from kvcached_core.config import PREFIX, Config
from kvcached_core.errors import DiskImageError
from kvcached_core.ledger.lock import hold_byte, take_byte
from kvcached_core.units import format_bytes
from kvcached_core.weights.copies_folder import (
    FLAGS,
    RECORD,
    STAT_BLOCK_BYTES,
    WHOLE,
    Holder,
    copies_folder,
    files_of,
    read_holders,
    remove_unused,
    sweep,
)
from kvcached_core.weights.direct_file import DirectFile
from kvcached_core.weights.disk_image import DiskImage, open_image
from kvcached_core.weights.folder_lock import locked
from kvcached_core.weights.host_bytes import HostBytes
from kvcached_core.weights.moves import Moves, count_moves
from kvcached_core.weights.record import Shape, fsync_path, read_words, write_record

SETTING = "WEIGHTS_DISK"
PART = ".part"  # an image on its way to the disk


class DiskStore:
    """The images of one folder. Any thread may use it.

    Args:
        folder: Where they lie; it is made with the first image.
        config: The settings; they say what stays free of the disk.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        self._config = config

    def find(self, shape: Shape, stop: threading.Event) -> DiskImage | None:
        """Return the image of a shape if it is here and whole; see `open_image`."""
        return open_image(self.folder, shape, stop)

    def put(self, image: Path, fd: int, stop: threading.Event | None = None) -> DiskImage:
        """Have a finished image of host memory on the disk, too; it takes as long as the disk does.

        Where the disk has it already nothing is written.

        Args:
            image: The image; its record lies beside it.
            fd: Its open file, whose lock this process has, shared or alone.
            stop: Set when nobody wants it there any more.

        Raises:
            DiskImageError: If there is no room, the disk fails, or `stop` was set; the message
                says what to do.
            HostCopyError: If the folder cannot be used.
        """
        read = read_words(image.with_suffix(RECORD))
        if read is None:
            raise DiskImageError(f"{image} has no record that can be read")
        shape, words = read
        copies_folder(self.folder, SETTING)
        stop = threading.Event() if stop is None else stop
        found = self.find(shape, stop)
        if found is not None:
            if found.checksums == words["checksums"]:
                if found.shape.loaded != shape.loaded:
                    with suppress(OSError):  # then a start finds out again what is said there
                        write_record(found.path.with_suffix(RECORD), words)
                return found
            found.close()
        started = time.monotonic()
        try:
            file = self._part(shape)
            try:
                self._write(shape, fd, file, stop)
                with locked(self.folder):
                    target = self.folder / image.name
                    target.with_suffix(RECORD).unlink(missing_ok=True)
                    file.path.rename(target)
                    file.path = target
                    fsync_path(self.folder)
                    write_record(target.with_suffix(RECORD), words, is_durable=True)
                    fsync_path(self.folder)
                    hold_byte(file.fd, WHOLE)
            except BaseException:
                file.path.unlink(missing_ok=True)
                file.close()
                raise
        except OSError as error:
            raise self._failed(shape, error) from error
        count_moves(self.folder, Moves(1, shape.num_bytes, time.monotonic() - started))
        return DiskImage(
            shape, file, [(int(a), int(b)) for a, b in words["sums"]], words["checksums"]
        )

    def came_back(self, num_bytes: int, seconds: float) -> None:
        """Count an image that was read."""
        count_moves(self.folder, Moves(num_read=1, read_bytes=num_bytes, read_seconds=seconds))

    def was_spoiled(self) -> None:
        """Count an image whose bytes were others."""
        count_moves(self.folder, Moves(num_spoiled=1))

    def _part(self, shape: Shape) -> DirectFile:
        """Return a new file with room for an image, which this process alone has."""
        with locked(self.folder):
            for path in files_of(self.folder, PART):
                remove_unused(path)  # whoever wrote it was ended
            sweep(self.folder)
            self._make_room(shape)
            path = self.folder / f"{shape.key.digest}-{os.getpid()}-{time.time_ns()}{PART}"
            file = DirectFile(path, FLAGS | os.O_CREAT | os.O_EXCL)
            take_byte(file.fd, WHOLE)
            os.ftruncate(file.fd, shape.num_bytes)
            return file

    def _make_room(self, shape: Shape) -> None:
        """Remove images that nobody has open, those that were used longest ago first."""
        missing = shape.num_bytes - room_bytes(self.folder, self._config)
        holders = read_holders(self.folder)
        unused = sorted(
            (held for held in holders if not held.is_used),
            key=lambda held: (held.last_used_ns, held.path),
        )
        if missing > sum(held.num_bytes for held in unused):
            raise self._full(shape, holders)
        for held in unused:
            if missing <= 0:
                return
            if remove_unused(held.path):
                missing -= held.num_bytes
        if missing > 0:
            raise self._full(shape, read_holders(self.folder))

    def _full(self, shape: Shape, holders: list[Holder]) -> DiskImageError:
        kept = self._config.weights_disk_free
        room = max(room_bytes(self.folder, self._config), 0)
        shares = ", ".join(f"{held.name} {format_bytes(held.num_bytes)}" for held in holders)
        return DiskImageError(
            f"{self.folder} has no room for {format_bytes(shape.num_bytes)} of {shape.key.name}: "
            f"{format_bytes(room)} are left above the {PREFIX}{SETTING}_FREE of "
            f"{kept if isinstance(kept, str) else format_bytes(kept)}; images there: "
            f"{shares or 'none'}; free some of the disk, or set {PREFIX}{SETTING} to another folder"
        )

    def _write(self, shape: Shape, fd: int, file: DirectFile, stop: threading.Event) -> None:
        whole = HostBytes(shape.num_bytes, shape.page_bytes, fd)

        def write(address: int, num_bytes: int, offset: int) -> None:
            if stop.is_set():
                raise DiskImageError(f"{shape.key.name} is needed in memory again")
            file.write(address, num_bytes, offset)

        try:
            whole.save(write)
        finally:
            whole.close()
        os.fsync(file.fd)

    def _failed(self, shape: Shape, error: OSError) -> DiskImageError:
        what = "is full" if error.errno == errno.ENOSPC else f"fails: {error.strerror}"
        return DiskImageError(
            f"the disk of {self.folder} {what}; the image of {shape.key.name} stays in memory"
        )


def room_bytes(folder: Path, config: Config) -> int:
    """Return how much more may lie in a folder, with what others have begun to write there.

    Raises:
        OSError: If the folder is not there.
    """
    around = os.statvfs(folder)
    disk_bytes, free_bytes = around.f_blocks * around.f_frsize, around.f_bavail * around.f_frsize
    coming_bytes = 0
    for path in files_of(folder, PART):
        with suppress(OSError):
            found = path.stat()
            coming_bytes += max(found.st_size - STAT_BLOCK_BYTES * found.st_blocks, 0)
    return free_bytes - coming_bytes - config.weights_disk_free_bytes(disk_bytes)


def disk_store(config: Config) -> DiskStore | None:
    """Return where images go that host memory has no room for; None if nowhere."""
    return None if config.weights_disk is None else DiskStore(config.weights_disk, config)
