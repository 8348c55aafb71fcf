"""Who holds how much host memory, of all processes, against one budget.

It counts copies of weights, and what engines have for their offloaded caches; with the pool of
engines on the host these are no more than the process may use. Beside the copies
lies a file for each claim, locked as long as its process lives, so that nothing stays claimed when
one is killed. A copy that is finished counts by its size. One that
nobody uses is removed, the oldest first, when a claim needs the room.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event
from typing import Protocol

from kvcached_core.config import PREFIX, Config
from kvcached_core.errors import DiskImageError, HostBudgetError, HostCopyError
from kvcached_core.ledger.forks import disown_in_children
from kvcached_core.ledger.lock import take_byte
from kvcached_core.memory.host_memory import host_memory
from kvcached_core.units import format_bytes
from kvcached_core.weights.copies_folder import (
    CLAIM,
    FLAGS,
    RECORD,
    WHOLE,
    Holder,
    Words,
    copies_folder,
    is_current,
    read_holders,
    remove_unused,
    sweep,
    write_words,
)
from kvcached_core.weights.folder_lock import locked
from kvcached_core.weights.host_pool import POOL, pool_in_use
from kvcached_core.weights.offers import ask_for, is_offered

# How often who reads an image now and then is asked for it.
MAX_TRIES = 3
# How long who waits for room lets pass before it asks again.
LOOK_SECONDS = 0.5

logger = logging.getLogger("kvcached")


class OnDisk(Protocol):
    """An image on a disk, which nobody removes until it is closed."""

    @property
    def path(self) -> Path:
        """Its file."""

    def close(self) -> None:
        """Let it be removed."""


class Disk(Protocol):
    """Where images go."""

    def put(self, image: Path, fd: int, stop: Event | None = None) -> OnDisk:
        """Have an image on the disk, too; see `DiskStore.put`."""


class Claim:
    """Host memory that a process holds until `close`, or until it ends.

    A copy claims all that it needs before its first byte. Two that claimed while they are filled
    could each hold a part of the budget, and neither would ever be complete.

    Attributes:
        num_bytes: How much it is.
    """

    def __init__(self, folder: Path, words: Words) -> None:
        self.num_bytes = words.num_bytes
        self._path = folder / f"{os.getpid()}-{time.time_ns()}{CLAIM}"
        self._fd = os.open(self._path, FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            take_byte(self._fd, WHOLE)
            write_words(self._fd, words)
        except BaseException:
            self.close()
            raise
        disown_in_children(self)

    @property
    def fd(self) -> int:
        """The claim's open file; negative once it was closed."""
        return self._fd

    def close(self) -> None:
        """Give all of it back; a second call does nothing."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def disown(self) -> None:
        """Let go of the claim in a forked child; it stays its parent's."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class HostBudget:
    """What all of ours in host memory may take together: `KVCACHED_HOST_BUDGET`.

    Any thread may use it. Processes with another setting share the same claims, and each goes by
    its own.

    Args:
        config: The settings.
        usable_bytes: What this process may use of the host's memory; None looks.
        disk: Where images go that there is no room for; None if nowhere.

    Attributes:
        folder: Where claims and copies lie; it is made and checked with the first claim.
        budget_bytes: What all claims and copies together may be.
        disk: Where images go that there is no room for; None if nowhere.
    """

    def __init__(
        self, config: Config, usable_bytes: int | None = None, disk: Disk | None = None
    ) -> None:
        usable = host_memory().usable_bytes if usable_bytes is None else usable_bytes
        self.folder = config.copies_dir
        self._directory = config.dir
        self._usable_bytes = usable
        self.budget_bytes = config.host_budget_bytes(usable)
        self.disk = disk

    def claim(
        self,
        name: str,
        num_bytes: int,
        *,
        file: str = "",
        kind: str = "",
        instance: str = "",
        leftover: str = "",
        wait_seconds: float = 0.0,
    ) -> Claim:
        """Claim `num_bytes` of host memory.

        Args:
            name: What they are for, for people.
            num_bytes: How many.
            file: The copy in the folder that they are for; it does not count again by its size.
            kind: What they are for, for programs; empty for copies of weights.
            instance: The engine that they are for, if it is one.
            leftover: See `Words`; it is removed when this process has been killed.
            wait_seconds: For how long to ask again where there is no room, but a disk. Images that
                are read just now may go to it afterwards.

        Raises:
            HostBudgetError: If there is no room, or nowhere to write it down.
            HostCopyError: If the folder cannot be used.
        """
        words = Words(name, num_bytes, file, kind, instance, leftover)
        deadline = time.monotonic() + (wait_seconds if self.disk is not None else 0.0)
        while True:
            try:
                return self._claim(words)
            except HostBudgetError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(LOOK_SECONDS)

    def _claim(self, words: Words) -> Claim:
        name, num_bytes = words.name, words.num_bytes
        with self._room_for(name, num_bytes):
            try:
                return Claim(self.folder, words)
            except OSError as error:
                raise HostBudgetError(
                    f"{self.folder} has no room to claim {format_bytes(num_bytes)} for {name}: "
                    f"{error.strerror}; free it, or set {PREFIX}WEIGHTS_DIR to another folder",
                    num_bytes,
                    self.budget_bytes,
                ) from error

    @contextmanager
    def _room_for(self, name: str, num_bytes: int) -> Iterator[None]:
        """Make room for so many bytes, and let nobody else claim any meanwhile.

        An image goes to the disk while nobody's claim waits for that: it is chosen under the lock,
        and moved outside of it.
        """
        stuck: dict[Path, str] = {}
        num_tries = Counter[Path]()
        while True:
            with locked(copies_folder(self.folder)):
                sweep(self.folder)
                victim = self._victim(name, num_bytes, stuck)
                if victim is None:
                    yield
                    return
            num_tries[victim.path] += 1
            try:
                if num_tries[victim.path] > MAX_TRIES:
                    raise DiskImageError(f"{victim.name} is read again and again")
                self._move(victim)
            except HostCopyError as error:
                stuck[victim.path] = str(error)
                logger.warning("kvcached: %s stays in host memory: %s", victim.name, error)

    def _victim(self, name: str, num_bytes: int, stuck: Mapping[Path, str]) -> Holder | None:
        """Return what has to go to the disk first; None if there is room.

        Without a disk what nobody uses is removed.

        Args:
            name: What the bytes are for.
            num_bytes: How many there have to be.
            stuck: What cannot go to the disk, and why.
        """
        holders, room_bytes = read_holders(self.folder), self._room_bytes()
        left = room_bytes - num_bytes - sum(held.num_bytes for held in holders)
        going = [held for held in holders if self._may_go(held, stuck)]
        if left + sum(held.num_bytes for held in going) < 0:
            staying = [held for held in holders if held not in going]
            raise self._error(name, num_bytes, room_bytes, staying, stuck.values())
        going.sort(key=lambda held: (held.is_used, held.last_used_ns, held.path))
        if self.disk is not None:
            return going[0] if left < 0 else None
        for held in going:
            if left >= 0:
                break
            if remove_unused(held.path):
                logger.info("kvcached: removed the host copy of %s, unused", held.name)
                left += held.num_bytes
        if left < 0:  # somebody began to use one of them
            raise self._error(name, num_bytes, room_bytes, read_holders(self.folder))
        return None

    def _room_bytes(self) -> int:
        """Return the budget, or less where engines on the host have a pool beside it."""
        pool_bytes = pool_in_use(self._directory)
        most_bytes = self._usable_bytes - pool_bytes if pool_bytes else self.budget_bytes
        return max(min(self.budget_bytes, most_bytes), 0)

    def _may_go(self, held: Holder, stuck: Mapping[Path, str]) -> bool:
        if held.path in stuck:
            return False
        return not held.is_used or (self.disk is not None and is_offered(held.path))

    def _move(self, held: Holder) -> None:
        """Have an image on the disk in the place of host memory, unless somebody uses it now.

        Raises:
            HostCopyError: If it cannot go there; it is where it was.
        """
        if self.disk is None:
            return
        if held.is_used and (problem := ask_for(held.path)):
            raise DiskImageError(problem)
        try:
            fd = os.open(held.path, FLAGS)
        except OSError:
            return  # somebody was quicker
        try:
            if take_byte(fd, WHOLE) and is_current(fd, held.path):
                with closing(self.disk.put(held.path, fd)):
                    held.path.with_suffix(RECORD).unlink(missing_ok=True)
                    held.path.unlink()
                logger.info("kvcached: the host copy of %s went to the disk", held.name)
        finally:
            os.close(fd)

    def _error(
        self,
        name: str,
        num_bytes: int,
        room_bytes: int,
        holders: list[Holder],
        reasons: Iterable[str] = (),
    ) -> HostBudgetError:
        shares = [f"{held.name} {format_bytes(held.num_bytes)}" for held in holders]
        beside = ""
        if room_bytes < self.budget_bytes:
            beside = (
                f"; {POOL} leaves {format_bytes(room_bytes)} of it, of "
                f"{format_bytes(self._usable_bytes)} that may be used"
            )
        return HostBudgetError(
            f"{name} needs {format_bytes(num_bytes)} of host memory; of the "
            f"{PREFIX}HOST_BUDGET of {format_bytes(self.budget_bytes)} "
            f"{', '.join(shares) if shares else 'nothing'} is in use"
            f"{beside}{''.join(f'; {reason}' for reason in dict.fromkeys(reasons))}",
            num_bytes,
            room_bytes,
        )
