"""Files that only their user may change, read and written whole."""

import os
import stat
from pathlib import Path

from kvcached_core.errors import ConfigError

MAX_FILE_BYTES = 1 << 20


def read_own(path: Path, *, is_secret: bool = False) -> str:
    """Return the text of a file that nobody else can have changed.

    Args:
        path: The file. It has to belong to this user or to root.
        is_secret: Whether nobody else may read it, either.

    Raises:
        ConfigError: If it cannot be read, or somebody else may change it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    try:  # the file that is looked at is the one that is read
        _check(path, os.fstat(descriptor), is_secret=is_secret)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None


def write_own(path: Path, text: str) -> None:
    """Write a file that nobody else may read or change, whole or not at all.

    Raises:
        OSError: If the disk is full, or the folder gone; what was written before stays.
    """
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w") as file:  # noqa: PTH123  a descriptor
        file.write(text)
    new.rename(path)


def _check(path: Path, found: os.stat_result, *, is_secret: bool) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path} is not a file")
    if found.st_uid not in {os.geteuid(), 0}:
        raise ConfigError(
            f"{path} belongs to user {found.st_uid}; it has to belong to this user, "
            f"{os.geteuid()}, or to root"
        )
    mode = stat.S_IMODE(found.st_mode)
    if is_secret and mode & 0o077:
        raise ConfigError(f"{path} has mode {mode:04o}; it holds secrets: chmod 600 {path}")
    if mode & 0o022:
        raise ConfigError(f"{path} has mode {mode:04o}, others may write it: chmod go-w {path}")
