"""The folder of the host copies: what lies in it, who has it, and what may be removed.

Three kinds of files: an image and its record, see `host_file`, and claims, see `host_budget`. The
first byte of an image and of a claim is locked by who has it; the kernel drops the locks of a
process that ends, however it ends.
"""

import errno
import json
import logging
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvcached_core.config import PREFIX
from kvcached_core.errors import HostCopyError
from kvcached_core.ledger.folder import foreign
from kvcached_core.ledger.lock import is_byte_held, take_byte

IMAGE, RECORD, NEW_RECORD, CLAIM = ".image", ".json", ".new", ".claim"
WHOLE = 0  # the byte whose lock stands for all of a file
FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW

logger = logging.getLogger("kvcached")


@dataclass(frozen=True)
class Holder:
    """Something that host memory of ours is held for.

    Attributes:
        name: What it is called, for people.
        num_bytes: How much it is.
        is_used: Whether a process has it; a finished copy stays when it has no user any more.
        path: The file that says so, or that it is.
        last_used_ns: When a copy was last opened or left, in nanoseconds since the epoch.
    """

    name: str
    num_bytes: int
    is_used: bool
    path: Path
    last_used_ns: int = 0


def copies_folder(folder: Path) -> Path:
    """Make the folder of the host copies, for this user alone, and return it.

    Folders above it that are missing are made alike: one of them may be that of the ledgers.

    Raises:
        HostCopyError: If it cannot be made, is not ours, or others may look into it.
    """
    try:
        missing = [place for place in folder.parents if not place.exists()]
        for place in (*reversed(missing), folder):
            place.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise _not_made(folder, error.strerror) from error
    _check_owner(folder, found)
    return folder


def check_folder(folder: Path) -> Path:
    """Return what is there of the folder of the host copies, itself or the folder it would be in.

    Raises:
        HostCopyError: If an engine could not use it; nothing is made.
    """
    for place in (folder, *folder.parents):
        # Whose folder may not be looked into, the folder above it says.
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            found = place.lstat()
            if place == folder:
                _check_owner(folder, found)
            elif not stat.S_ISDIR(found.st_mode) or not os.access(place, os.W_OK | os.X_OK):
                raise _not_made(folder, f"{place} may not be written to")
            return place
    raise _not_made(folder, os.strerror(errno.ENOENT))


def _not_made(folder: Path, reason: str | None) -> HostCopyError:
    return HostCopyError(
        f"{PREFIX}WEIGHTS_DIR={str(folder)!r} cannot be made: {reason}; set it to a folder that "
        "this user may write"
    )


def _check_owner(folder: Path, found: os.stat_result) -> None:
    problem = foreign("WEIGHTS_DIR", folder, found)
    if problem:
        raise HostCopyError(problem)


def read_holders(folder: Path) -> list[Holder]:
    """Return what host memory of ours is held for now; nothing is changed or waited for."""
    holders, filling = [], set()
    for path in _files(folder, CLAIM):
        words = _read(path)
        if words is not None and _is_held(path):
            name, num_bytes, file = words
            holders.append(Holder(name, num_bytes, is_used=True, path=path))
            filling.add(file)
    for path in _files(folder, IMAGE):
        record = path.with_suffix(RECORD)
        words = _read(record)
        with suppress(OSError):
            if path.name not in filling:
                holders.append(
                    Holder(
                        path.name if words is None else words[0],
                        path.stat().st_size,
                        _is_held(path),
                        path,
                        record.stat().st_mtime_ns if record.exists() else 0,
                    )
                )
    return holders


def is_current(fd: int, path: Path) -> bool:
    """Return whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def sweep(folder: Path) -> None:
    """Remove claims of processes that ended, and copies that nobody finishes any more.

    The caller has the budget's lock: a claim is locked only after it is made.
    """
    for path in _files(folder, CLAIM):
        if not _is_held(path):
            path.unlink(missing_ok=True)
    for path in _files(folder, IMAGE):
        if not path.with_suffix(RECORD).exists() and remove_unused(path):
            logger.warning("kvcached: removed %s: whoever filled it was ended", path)
    for kind in (RECORD, NEW_RECORD):
        for path in _files(folder, kind):
            if not path.with_suffix(IMAGE).exists():
                path.unlink(missing_ok=True)


def remove_unused(path: Path) -> bool:
    """Remove a copy that nobody has open; return whether that was so."""
    try:
        fd = os.open(path, FLAGS)
    except OSError:
        return False
    try:
        if not take_byte(fd, WHOLE) or not is_current(fd, path):
            return False
        path.with_suffix(RECORD).unlink(missing_ok=True)
        path.unlink()
    finally:
        os.close(fd)
    return True


def _files(folder: Path, kind: str) -> list[Path]:
    """Return the regular files of a kind; what else has such a name is not ours."""
    return [
        path for path in sorted(folder.glob(f"*{kind}")) if path.is_file() and not path.is_symlink()
    ]


def _is_held(path: Path) -> bool:
    try:
        fd = os.open(path, FLAGS)
    except OSError:
        return False
    try:
        return is_byte_held(fd, WHOLE)
    finally:
        os.close(fd)


def _read(path: Path) -> tuple[str, int, str] | None:
    """Return the name, the bytes and the file of a claim or a record, or None."""
    try:
        words = json.loads(path.read_bytes())
        return str(words["name"]), int(words["num_bytes"]), str(words.get("file", ""))
    except (OSError, ValueError, TypeError, KeyError):
        return None
