"""Opening a ledger file: made, checked, or set aside when it is damaged.

A damaged file is renamed, and its first word is cleared: whoever still has it mapped sees that at
its next operation, opens the new file and writes its own row there.
"""

import contextlib
import logging
import mmap
import os
import stat
import time
from pathlib import Path

from kvcached_core import ledger_file as layout
from kvcached_core.errors import LedgerError
from kvcached_core.ledger_file import FileLock, Header, column_sum

WRITABLE = "set KVCACHED_DIR to a folder that this user may write"

logger = logging.getLogger("kvcached")


def default_directory() -> Path:
    """Return the folder of the ledgers when nothing else is set."""
    return Path(f"/dev/shm/kvcached-{os.geteuid()}")  # noqa: S108  made 0700 and checked on open


def ledger_directory(directory: Path) -> Path:
    """Make the folder of the ledgers, for this user alone, and return it.

    Raises:
        LedgerError: If it cannot be made, is not ours, or others may look into it.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise LedgerError(
            f"KVCACHED_DIR={str(directory)!r} cannot be made: {error.strerror}; {WRITABLE}"
        ) from error
    _check_owner(directory, found)
    return directory


def ledger_paths(directory: Path) -> list[Path]:
    """Return the ledgers in a folder, which is checked but not made; none is not an error.

    Raises:
        LedgerError: If the folder is not ours, or others may look into it.
    """
    try:
        _check_owner(directory, directory.lstat())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LedgerError(
            f"KVCACHED_DIR={str(directory)!r} cannot be read: {error.strerror}"
        ) from error
    return sorted(directory.glob("*.ledger"))


def _check_owner(directory: Path, found: os.stat_result) -> None:
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise LedgerError(f"KVCACHED_DIR={str(directory)!r} is not a folder of this user")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise LedgerError(
            f"KVCACHED_DIR={str(directory)!r} is open to other users (mode "
            f"{stat.S_IMODE(found.st_mode):04o}); allowed is 0700"
        )


def open_ledger_file(path: Path, capacity_bytes: int | None) -> tuple[int, memoryview]:
    """Return a descriptor of the ledger at `path` and its words.

    Args:
        path: The file; its folder exists.
        capacity_bytes: What a new file says; None opens only a file that is there and changes
            nothing.

    Raises:
        LedgerError: If it is missing, damaged, of another version or of another user.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    if capacity_bytes is not None:
        flags |= os.O_CREAT
    while True:
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            hint = "" if capacity_bytes is None else f"; {WRITABLE}"
            raise LedgerError(
                f"the ledger {path} cannot be opened: {error.strerror}{hint}"
            ) from error
        try:
            with FileLock(fd):
                if _is_current(fd, path):
                    words = _words_in(fd, path, capacity_bytes)
                    if words is not None:
                        return fd, words
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # set aside, or removed by its last user: open the new one


def _is_current(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def _words_in(fd: int, path: Path, capacity_bytes: int | None) -> memoryview | None:
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode):
        raise LedgerError(f"the ledger {path} is not a file of this user")
    if found.st_size == 0 and capacity_bytes is not None:
        return _new_words(fd, path, capacity_bytes)
    problem = f"it has {found.st_size} bytes, expected are {layout.FILE_BYTES}"
    if found.st_size == layout.FILE_BYTES:
        words = memoryview(mmap.mmap(fd, layout.FILE_BYTES)).cast("q")
        header = Header(words)
        if header.magic == layout.MAGIC and header.version != layout.VERSION:
            version = header.version
            header.release()
            words.release()
            raise LedgerError(
                f"the ledger {path} is of version {version}, this kvcached writes version "
                f"{layout.VERSION}; run one version on a device, or remove the file when no engine "
                "uses it"
            )
        found_problem = _problem(header)
        if found_problem is None:
            return words
        problem = found_problem
        header.release()
        words.release()
    if capacity_bytes is None:
        raise LedgerError(
            f"the ledger {path} is damaged: {problem}; the next engine that uses it sets it aside"
        )
    _set_aside(fd, path, problem)
    return None


def _new_words(fd: int, path: Path, capacity_bytes: int) -> memoryview:
    try:
        # Not only the length: a page that cannot be provided later would end the process.
        os.posix_fallocate(fd, 0, layout.FILE_BYTES)
    except OSError as error:
        os.ftruncate(fd, 0)
        path.unlink(missing_ok=True)
        raise LedgerError(
            f"the ledger {path} cannot be made: {error.strerror}; {layout.FILE_BYTES} bytes are "
            "needed there, or set KVCACHED_DIR to another folder in memory"
        ) from error
    words = memoryview(mmap.mmap(fd, layout.FILE_BYTES)).cast("q")
    Header(words).initialise(capacity_bytes)
    return words


def _problem(header: Header) -> str | None:
    if header.magic != layout.MAGIC:
        return "its first word is not a ledger's"
    if header.capacity_bytes <= 0 or not 0 <= header.num_rows <= layout.NUM_ROWS:
        return f"its header says {header.num_rows} rows and {header.capacity_bytes} bytes"
    for column in (layout.RESIDENT, layout.PROMISED, layout.STATIC):
        if column_sum(header.words, column, header.num_rows) < 0:
            return "a row holds less than nothing"
    return None


def _set_aside(fd: int, path: Path, problem: str) -> None:
    aside = path.with_suffix(f".damaged-{time.time_ns()}")
    logger.warning(
        "kvcached: the ledger %s is damaged: %s; it is set aside as %s, and live engines write "
        "their rows into a new one",
        path,
        problem,
        aside.name,
    )
    with contextlib.suppress(OSError):
        os.ftruncate(fd, layout.FILE_BYTES)  # who has it mapped must not read behind its end
    os.pwrite(fd, bytes(8), 0)
    path.rename(aside)
