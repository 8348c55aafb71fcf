"""Opening a host copy: shared, or this process's own, or none, with one line that says why."""

import errno
import logging
import threading
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvcached_core.config import Config
from kvcached_core.errors import DiskImageError, HostCopyError
from kvcached_core.units import format_bytes
from kvcached_core.weights.disk_image import DiskImage
from kvcached_core.weights.disk_store import DiskStore, disk_store
from kvcached_core.weights.host_budget import Claim, HostBudget
from kvcached_core.weights.host_bytes import HostBytes
from kvcached_core.weights.host_copy import HostCopy
from kvcached_core.weights.host_file import SharedFile, open_shared
from kvcached_core.weights.kept import find_kept
from kvcached_core.weights.key import CopyKey, Loaded
from kvcached_core.weights.record import Shape

logger = logging.getLogger("kvcached")


class Paged(Protocol):
    """The layout of an image, as far as a copy goes by it."""

    @property
    def page_bytes(self) -> int:
        """The size of a page."""

    @property
    def num_pages(self) -> int:
        """How many there are."""


def open_copy(
    config: Config,
    key: CopyKey,
    layout: Paged,
    budget: HostBudget,
    *,
    stop: threading.Event | None = None,
    cpus: Collection[int] = (),
    loaded: Loaded | None = None,
) -> HostCopy | None:
    """Return a host copy for the weights of `key`, complete or to be filled.

    While another process fills it this waits. One line of the log says why a copy is not shared,
    or why there is none. Every byte of it is there when this returns, which takes seconds.

    Args:
        config: The settings.
        key: Of the weights.
        layout: Of their image.
        budget: What host memory is claimed from.
        stop: Set when nobody wants the copy any more.
        cpus: The processors near the device; memory is taken near them.
        loaded: What the model is, where later starts may have it from this copy.

    Returns:
        The copy, or None: the weights have to stay on the device.
    """
    stop = threading.Event() if stop is None else stop
    shape = Shape(key, layout.page_bytes, layout.num_pages, loaded)
    opening = _Opening(config.copies_dir, shape, budget, disk_store(config), stop, cpus)
    reasons: list[str] = []
    for attempt in (opening.shared, opening.private):
        try:
            copy = attempt()
        except HostCopyError as error:
            reasons.append(str(error))
            continue
        if stop.is_set():
            if copy is not None:
                copy.close()
            return None
        if reasons:
            logger.warning("kvcached: the host copy of %s is not shared: %s", key.name, reasons[0])
        return copy
    why = "; ".join(dict.fromkeys(reasons))
    logger.warning("kvcached: the weights of %s stay on the device: %s", key.name, why)
    return None


def open_kept(
    config: Config, origin: str, budget: HostBudget, cpus: Collection[int] = ()
) -> tuple[HostCopy, Loaded] | None:
    """Return a copy that is there and complete, and what the model is with it; or None.

    Every byte of it was read and compared with its checksum, which takes seconds.

    Args:
        config: The settings.
        origin: What decides the weights, see `origin_digest`.
        budget: What host memory is claimed from.
        cpus: See `open_copy`.
    """
    folders = [config.copies_dir, config.weights_disk]
    found = find_kept([folder for folder in folders if folder is not None], origin)
    if found is None:
        return None
    shape, loaded = found
    try:
        copy = _Opening(
            config.copies_dir, shape, budget, disk_store(config), threading.Event(), cpus
        ).shared()
    except HostCopyError as error:
        logger.warning("kvcached: the host copy of %s is not used: %s", shape.key.name, error)
        return None
    if copy is None or not copy.is_complete:
        if copy is not None:
            copy.close()
        return None
    return copy, loaded


@dataclass(frozen=True)
class _Opening:
    """What `open_copy` was asked for."""

    folder: Path
    shape: Shape
    budget: HostBudget
    disk: DiskStore | None
    stop: threading.Event
    cpus: Collection[int]

    def shared(self) -> HostCopy | None:
        """Return a copy in a shared file, or None if nobody wants it any more.

        Raises:
            HostCopyError: If there is no room, or something that must not be replaced.
        """
        try:
            file = open_shared(self.folder, self.shape, self.stop)
            return None if file is None else self._in_file(file)
        except OSError as error:
            reason = f"cannot be used: {error.strerror}"
            if error.errno == errno.ENOSPC:
                size = format_bytes(self.shape.num_bytes)
                reason = f"has no room for {size}: {error.strerror}; Docker: raise --shm-size"
            raise HostCopyError(f"{self.folder} {reason}") from error

    def private(self) -> HostCopy:
        """Return a copy that this process has for itself.

        Raises:
            HostCopyError: If there is no room.
        """
        shape = self.shape
        with ExitStack() as undo:
            on_disk = self._on_disk()
            if on_disk is not None:
                undo.callback(on_disk.close)
            claim = self.budget.claim(shape.key.name, shape.num_bytes)
            undo.callback(claim.close)
            try:
                whole = HostBytes(shape.num_bytes, shape.page_bytes)
                undo.callback(whole.close)
                is_here = on_disk is not None and self._bring(on_disk, whole)
                if not is_here:
                    whole.touch(self.stop, self.cpus)
            except OSError as error:
                raise HostCopyError(
                    f"the host has no {format_bytes(shape.num_bytes)} for a copy of this process: "
                    f"{error.strerror}"
                ) from error
            copy = HostCopy(shape, self.budget, whole, claim=claim)
            if is_here and on_disk is not None:
                copy.sums[:] = on_disk.sums
                on_disk.close()
            undo.pop_all()
        return copy

    def _in_file(self, file: SharedFile) -> HostCopy:
        claim: Claim | None = None
        shape = self.shape
        with ExitStack() as undo:
            undo.callback(file.close)  # removes what is not finished
            on_disk = None
            if file.sums is None:
                # It is open before others are asked for room: what they write must not remove it.
                on_disk = self._on_disk()
                if on_disk is not None:
                    undo.callback(on_disk.close)
                claim = self.budget.claim(shape.key.name, shape.num_bytes, file=file.path.name)
                undo.callback(claim.close)
                file.allocate()
            whole = HostBytes(shape.num_bytes, shape.page_bytes, file.fd)
            undo.callback(whole.close)
            if on_disk is not None and claim is not None and self._bring(on_disk, whole):
                file.publish(on_disk.sums, on_disk.checksums, on_disk.shape)
                claim.close()  # from now on the file counts by its size
                claim = None
                on_disk.close()
            else:
                self._have(file, whole)
            undo.pop_all()
        return HostCopy(shape, self.budget, whole, file, claim)

    def _have(self, file: SharedFile, whole: HostBytes) -> None:
        """Have every byte there, and compare them with the record if there is one."""
        whole.touch(self.stop, self.cpus)
        if file.sums is None:
            file.reserve()
        elif whole.checksums(self.stop) != file.checksums and not self.stop.is_set():
            problem = "its bytes are not those that its record is of"
            if not file.start_over():
                raise HostCopyError(f"{file.path} is in use although {problem}")
            logger.warning("kvcached: the host copy %s is filled again: %s", file.path, problem)

    def _on_disk(self) -> DiskImage | None:
        return None if self.disk is None else self.disk.find(self.shape, self.stop)

    def _bring(self, image: DiskImage, whole: HostBytes) -> bool:
        """Have the bytes of an image on disk; return whether they are those of its record."""
        disk, name = self.disk, self.shape.key.name
        started = time.monotonic()
        try:
            spoiled = image.read(whole, self.stop, self.cpus)
        except DiskImageError as error:
            logger.warning("kvcached: the image of %s is not used: %s", name, error)
            return False
        if self.stop.is_set() or disk is None:
            return False
        if spoiled:
            logger.warning(
                "kvcached: the image %s is removed: %d of %d pages are not those that its record "
                "is of",
                image.path,
                len(spoiled),
                image.shape.num_pages,
            )
            image.remove()
            disk.was_spoiled()
            return False
        seconds = time.monotonic() - started
        disk.came_back(image.shape.num_bytes, seconds)
        logger.info("kvcached: %s came back from the disk in %.2f s", name, seconds)
        return True
