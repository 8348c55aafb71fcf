"""Opening a ledger file: made, checked, or set aside when it is damaged.

A damaged file is renamed, and its first word is cleared; a file that its last user removes says so
there before it is unlinked. Whoever still has such a file mapped sees that at its next operation,
and opens the one in its place.
"""

import errno
import logging
import mmap
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2s
from pathlib import Path

from kvcached_core.errors import LedgerBusyError, LedgerError
from kvcached_core.ledger import file as ledger_file
from kvcached_core.ledger.file import Header, RowKey, column_sum
from kvcached_core.ledger.folder import foreign
from kvcached_core.ledger.lock import FileLock

WRITABLE = "set KVCACHED_DIR to a folder that this user may write"

logger = logging.getLogger("kvcached")


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


# What a socket's address has room for, and how much of it our file names take.
MAX_ADDRESS_BYTES = 107
_LONGEST_DEVICE = 16


def doorbell_path(ledger_path: Path, row: RowKey) -> Path:
    """Return the socket on which the instance in `row` is woken.

    A GPU's name is 40 characters long, and a socket's address has room for 107 with the folder.

    Raises:
        LedgerError: If the folder's name is too long.
    """
    device = ledger_path.stem
    if len(device) > _LONGEST_DEVICE:
        device = blake2s(device.encode(), digest_size=_LONGEST_DEVICE // 2).hexdigest()
    path = ledger_path.with_name(f"{device}.{row.number}.sock")
    if (num_bytes := len(os.fsencode(path))) > MAX_ADDRESS_BYTES:
        folder = os.fsencode(path.parent)
        raise LedgerError(
            f"KVCACHED_DIR={str(path.parent)!r} is too long by {num_bytes - MAX_ADDRESS_BYTES} "
            f"bytes: the address of a socket there has {num_bytes}, allowed are "
            f"{MAX_ADDRESS_BYTES}; use a folder with a name of up to "
            f"{len(folder) - num_bytes + MAX_ADDRESS_BYTES} bytes"
        )
    return path


def _check_owner(directory: Path, found: os.stat_result) -> None:
    problem = foreign("DIR", directory, found)
    if problem:
        raise LedgerError(problem)


def open_ledger_file(
    path: Path, capacity_bytes: int | None, seconds: float
) -> tuple[int, memoryview]:
    """Return a descriptor of the ledger at `path` and its words.

    Args:
        path: The file; its folder exists.
        capacity_bytes: What a new file says; None opens only a file that is there, takes no lock
            and changes nothing.
        seconds: How long to wait for the lock.

    Raises:
        LedgerBusyError: If somebody held the lock for longer.
        LedgerError: If it is missing, damaged, of another version or of another user.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    if capacity_bytes is not None:
        flags |= os.O_CREAT
    deadline = time.monotonic() + _MAKING_SECONDS
    while True:
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            hint = f"; {WRITABLE}"
            if capacity_bytes is None:
                hint = "; its last engine has left" if error.errno == errno.ENOENT else ""
            raise LedgerError(
                f"the ledger {path} cannot be opened: {error.strerror}{hint}"
            ) from error
        try:
            _check_file(fd, path)
            if capacity_bytes is None:
                words = _words_to_read(fd, path, is_last_try=time.monotonic() > deadline)
            else:
                with _locked(fd, path, seconds):
                    words = _words_to_write(fd, path, capacity_bytes)
            if words is not None:
                return fd, words
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # set aside, removed by its last user, or not written yet: look again


def busy(fd: int, path: Path) -> LedgerBusyError:
    """Return the error that names who holds the lock of a ledger for too long."""
    sequence = struct.unpack("q", os.pread(fd, 8, 8 * ledger_file.SEQUENCE).ljust(8, b"\0"))[0]
    holder = f"process {-sequence}, as it sees itself," if sequence < 0 else "another process"
    return LedgerBusyError(
        f"the ledger {path} is locked by {holder} which does not go on; it may be stopped: "
        "continue it with `kill -CONT`, or end it"
    )


# How long a file may be there without being whole: somebody is making it.
_MAKING_SECONDS = 0.1
_LOOK_SECONDS = 1e-3


@contextmanager
def _locked(fd: int, path: Path, seconds: float) -> Iterator[None]:
    lock = FileLock(fd)
    if not lock.acquire(seconds):
        raise busy(fd, path)
    try:
        yield
    finally:
        lock.release()


def _check_file(fd: int, path: Path) -> None:
    """Refuse what is not ours, before anything in it is believed or touched."""
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode):
        raise LedgerError(f"the ledger {path} is not a file of this user")
    start = os.pread(fd, 16, 0)
    if len(start) < 16:  # noqa: PLR2004  two words
        return
    magic, version = struct.unpack("qq", start)
    if magic == ledger_file.MAGIC and version != ledger_file.VERSION:
        raise LedgerError(
            f"the ledger {path} is of version {version}, this kvcached writes version "
            f"{ledger_file.VERSION}: engines of another kvcached may be using it, and it is left "
            "as it is; run one version on a device, set KVCACHED_DIR to another folder, or remove "
            "the file when no engine uses it"
        )


def _is_current(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def _words_to_read(fd: int, path: Path, *, is_last_try: bool) -> memoryview | None:
    """Return the words of a file that is as it should be, or None to look again."""
    words, problem = _mapped(fd)
    if words is not None:
        return words
    if not is_last_try:
        time.sleep(_LOOK_SECONDS)
        return None
    raise LedgerError(
        f"the ledger {path} is damaged: {problem}; the next engine that uses it sets it aside"
    )


def _words_to_write(fd: int, path: Path, capacity_bytes: int) -> memoryview | None:
    """Return the words of a file, new or old; None if there is another one now."""
    if not _is_current(fd, path):
        return None
    if os.fstat(fd).st_size == 0:
        return _new_words(fd, path, capacity_bytes)
    words, problem = _mapped(fd)
    if words is None:
        if problem == _GONE:
            path.unlink(missing_ok=True)  # who removed it was ended in the middle
        else:
            set_aside(fd, path, problem)
    return words


def _mapped(fd: int) -> tuple[memoryview | None, str]:
    num_bytes = os.fstat(fd).st_size
    if num_bytes != ledger_file.FILE_BYTES:
        return None, f"it has {num_bytes} bytes, expected are {ledger_file.FILE_BYTES}"
    words = memoryview(mmap.mmap(fd, ledger_file.FILE_BYTES)).cast("q")
    problem = _problem(Header(words))
    if problem is None:
        return words, ""
    words.release()
    return None, problem


def _new_words(fd: int, path: Path, capacity_bytes: int) -> memoryview:
    try:
        # Not only the length: a page that cannot be provided later would end the process.
        os.posix_fallocate(fd, 0, ledger_file.FILE_BYTES)
    except OSError as error:
        os.ftruncate(fd, 0)
        path.unlink(missing_ok=True)
        raise LedgerError(
            f"the ledger {path} cannot be made: {error.strerror}; {ledger_file.FILE_BYTES} bytes "
            "are needed there, or set KVCACHED_DIR to another folder in memory"
        ) from error
    words = memoryview(mmap.mmap(fd, ledger_file.FILE_BYTES)).cast("q")
    # Generations go on where those of any earlier file ended.
    Header(words).initialise(capacity_bytes, first_generation=time.time_ns())
    return words


_GONE = "its last user removed it"


def _problem(header: Header) -> str | None:
    if header.magic == ledger_file.REMOVED:
        return _GONE
    if header.magic != ledger_file.MAGIC:
        return "its first word is not a ledger's"
    if header.capacity_bytes <= 0 or not 0 <= header.num_rows <= ledger_file.NUM_ROWS:
        return f"its header says {header.num_rows} rows and {header.capacity_bytes} bytes"
    for column in (
        ledger_file.RESIDENT,
        ledger_file.PROMISED,
        ledger_file.STATIC,
        ledger_file.WEIGHTS,
    ):
        if column_sum(header.words, column, header.num_rows) < 0:
            return "a row holds less than nothing"
    return None


def set_aside(fd: int, path: Path, problem: str) -> None:
    """Rename a damaged file and say so in its first word; the caller has its lock."""
    aside = path.with_suffix(f".damaged-{time.time_ns()}")
    logger.warning(
        "kvcached: the ledger %s is damaged: %s; it is set aside as %s, and live engines write "
        "their rows into a new one",
        path,
        problem,
        aside.name,
    )
    with suppress(OSError):
        os.ftruncate(fd, ledger_file.FILE_BYTES)  # who has it mapped must not read behind its end
    os.pwrite(fd, bytes(8), 0)
    path.rename(aside)
