"""Opening a host copy: shared, or this process's own, or none, with one line that says why."""

import errno
import logging
import threading
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvcached_core.config import Config
from kvcached_core.errors import HostCopyError
from kvcached_core.units import format_bytes
from kvcached_core.weights.host_budget import Claim, HostBudget
from kvcached_core.weights.host_bytes import HostBytes, touched
from kvcached_core.weights.host_copy import HostCopy
from kvcached_core.weights.host_file import Shape, SharedFile, open_shared
from kvcached_core.weights.key import CopyKey

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

    Returns:
        The copy, or None: the weights have to stay on the device.
    """
    stop = threading.Event() if stop is None else stop
    opening = _Opening(
        config.copies_dir, Shape(key, layout.page_bytes, layout.num_pages), budget, stop, cpus
    )
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


@dataclass(frozen=True)
class _Opening:
    """What `open_copy` was asked for."""

    folder: Path
    shape: Shape
    budget: HostBudget
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
        claim = self.budget.claim(shape.key.name, shape.num_bytes)
        try:
            whole = touched(shape.num_bytes, shape.page_bytes, self.stop, self.cpus)
        except OSError as error:
            claim.close()
            raise HostCopyError(
                f"the host has no {format_bytes(shape.num_bytes)} for a copy of this process: "
                f"{error.strerror}"
            ) from error
        return HostCopy(shape, self.budget, whole, claim=claim)

    def _in_file(self, file: SharedFile) -> HostCopy:
        claim: Claim | None = None
        shape = self.shape
        with ExitStack() as undo:
            undo.callback(file.close)  # removes what is not finished
            if file.sums is None:
                claim = self.budget.claim(shape.key.name, shape.num_bytes, file=file.path.name)
                undo.callback(claim.close)
                file.allocate()
            whole = HostBytes(shape.num_bytes, shape.page_bytes, file.fd)
            undo.callback(whole.close)
            whole.touch(self.stop, self.cpus)
            if file.sums is None:
                file.reserve()
            elif whole.checksums(self.stop) != file.checksums and not self.stop.is_set():
                problem = "its bytes are not those that its record is of"
                if not file.start_over():
                    raise HostCopyError(f"{file.path} is in use although {problem}")
                logger.warning("kvcached: the host copy %s is filled again: %s", file.path, problem)
            undo.pop_all()
        return HostCopy(shape, self.budget, whole, file, claim)
