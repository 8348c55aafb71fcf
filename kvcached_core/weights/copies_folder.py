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
from dataclasses import asdict, dataclass
from pathlib import Path

from kvcached_core.config import PREFIX
from kvcached_core.errors import HostCopyError
from kvcached_core.ledger.folder import foreign
from kvcached_core.ledger.lock import is_byte_held, take_byte

IMAGE, RECORD, NEW_RECORD, CLAIM = ".image", ".json", ".new", ".claim"
WEIGHTS_DIR = "WEIGHTS_DIR"
WHOLE = 0  # the byte whose lock stands for all of a file
MAX_LINE_BYTES = 4096
STAT_BLOCK_BYTES = 512  # of which the kernel counts what a file has
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
        kind: What it is; a name of who claimed it, empty for copies of weights.
        instance: Whose it is, if it is one engine's.
        last_used_ns: When a copy was last opened or left, in nanoseconds since the epoch; of two of
            one tick of the clock the first by name is the older one.
    """

    name: str
    num_bytes: int
    is_used: bool
    path: Path
    last_used_ns: int = 0
    kind: str = ""
    instance: str = ""


@dataclass(frozen=True)
class Words:
    """What the first line of a claim says, or a record; it never changes.

    Attributes:
        name: What it is for, for people.
        num_bytes: How much it is.
        file: The copy in the folder that a claim is for.
        kind: See `Holder`.
        instance: See `Holder`.
        leftover: A file elsewhere that holds the memory, which its maker removes unless it is
            killed. Nobody else may ever have a file of that path.
    """

    name: str
    num_bytes: int
    file: str = ""
    kind: str = ""
    instance: str = ""
    leftover: str = ""


def write_words(fd: int, words: Words) -> None:
    """Write the first line of a claim, whose file is empty."""
    os.pwrite(fd, json.dumps(asdict(words)).encode() + b"\n", 0)


def note_in(fd: int, line: str) -> None:
    """Write a line behind the first one of a claim, in the place of the last such line."""
    first = os.pread(fd, MAX_LINE_BYTES, 0).partition(b"\n")[0]
    os.pwrite(fd, line.encode(), len(first) + 1)


def read_note(path: Path) -> str:
    """Return that line, or what is there while it is written; nothing if there is none."""
    try:
        lines = path.read_text(errors="replace").split("\n")
    except OSError:
        return ""
    return lines[1] if len(lines) > 1 else ""


def copies_folder(folder: Path, setting: str = WEIGHTS_DIR) -> Path:
    """Make the folder of the host copies, for this user alone, and return it.

    Folders above it that are missing are made alike: one of them may be that of the ledgers.

    Args:
        folder: The folder.
        setting: What names it, without the prefix of all settings.

    Raises:
        HostCopyError: If it cannot be made, is not ours, or others may look into it.
    """
    try:
        missing = [place for place in folder.parents if not place.exists()]
        for place in (*reversed(missing), folder):
            place.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise _not_made(folder, error.strerror, setting) from error
    _check_owner(folder, found, setting)
    return folder


def check_folder(folder: Path, setting: str = WEIGHTS_DIR) -> Path:
    """Return what is there of the folder of the host copies, itself or the folder it would be in.

    Args:
        folder: The folder.
        setting: See `copies_folder`.

    Raises:
        HostCopyError: If an engine could not use it; nothing is made.
    """
    for place in (folder, *folder.parents):
        # Whose folder may not be looked into, the folder above it says.
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            found = place.lstat()
            if place == folder:
                _check_owner(folder, found, setting)
            elif not stat.S_ISDIR(found.st_mode) or not os.access(place, os.W_OK | os.X_OK):
                raise _not_made(folder, f"{place} may not be written to", setting)
            return place
    raise _not_made(folder, os.strerror(errno.ENOENT), setting)


def _not_made(folder: Path, reason: str | None, setting: str) -> HostCopyError:
    return HostCopyError(
        f"{PREFIX}{setting}={str(folder)!r} cannot be made: {reason}; set it to a folder that "
        "this user may write"
    )


def _check_owner(folder: Path, found: os.stat_result, setting: str) -> None:
    problem = foreign(setting, folder, found)
    if problem:
        raise HostCopyError(problem)


def read_holders(folder: Path) -> list[Holder]:
    """Return what host memory of ours is held for now; nothing is changed or waited for."""
    holders, filling = [], set()
    for path in files_of(folder, CLAIM):
        words = _read(path)
        if words is not None and is_used(path):
            holders.append(
                Holder(
                    words.name,
                    words.num_bytes,
                    is_used=True,
                    path=path,
                    kind=words.kind,
                    instance=words.instance,
                )
            )
            filling.add(words.file)
        elif words is not None and (num_bytes := _leftover_bytes(left := Path(words.leftover))):
            name = f"{left}, left by {words.name}"
            holders.append(Holder(name, num_bytes, is_used=False, path=left))
    for path in files_of(folder, IMAGE):
        record = path.with_suffix(RECORD)
        words = _read(record)
        with suppress(OSError):
            if path.name not in filling:
                holders.append(
                    Holder(
                        path.name if words is None else words.name,
                        path.stat().st_size,
                        is_used(path),
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
    for path in remove_leftovers(folder):
        path.unlink(missing_ok=True)
    for path in files_of(folder, IMAGE):
        if not path.with_suffix(RECORD).exists() and remove_unused(path):
            logger.warning("kvcached: removed %s: whoever filled it was ended", path)
    for kind in (RECORD, NEW_RECORD):
        for path in files_of(folder, kind):
            if not path.with_suffix(IMAGE).exists():
                path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the files that claimers left which were killed (`Words.leftover`).

    Returns:
        The claims of all processes that ended, and those that are being made: they say nothing yet.
    """
    ended = [path for path in files_of(folder, CLAIM) if not is_used(path)]
    for claim in ended:
        words = _read(claim)
        if words is not None and _leftover_bytes(path := Path(words.leftover)):
            with suppress(OSError):
                path.unlink()
                logger.warning("kvcached: removed %s: %s was killed", path, words.name)
    return ended


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


def _leftover_bytes(path: Path) -> int:
    """Return what a file takes if it is there, regular and this user's; else 0."""
    with suppress(OSError):
        found = path.lstat()
        if path.is_absolute() and stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
            return found.st_blocks * STAT_BLOCK_BYTES
    return 0


def files_of(folder: Path, kind: str) -> list[Path]:
    """Return the regular files of a kind; what else has such a name is not ours."""
    return [
        path for path in sorted(folder.glob(f"*{kind}")) if path.is_file() and not path.is_symlink()
    ]


def is_used(path: Path) -> bool:
    """Return whether a process has an image open, or a claim; not if it is gone."""
    try:
        fd = os.open(path, FLAGS)
    except OSError:
        return False
    try:
        return is_byte_held(fd, WHOLE)
    finally:
        os.close(fd)


def _read(path: Path) -> Words | None:
    """Return what a claim or a record says, or None."""
    try:
        words = json.loads(path.read_bytes().partition(b"\n")[0])
        return Words(
            str(words["name"]),
            int(words["num_bytes"]),
            *(str(words.get(key, "")) for key in ("file", "kind", "instance", "leftover")),
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
