"""Sizes and names as people write them, and what stands where nothing is written."""

import os
import re
from decimal import Decimal
from pathlib import Path

from kvcached_core.errors import ConfigError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
ALL_PERCENT = 100
DEFAULT_PAGE_BYTES = 16 * MIB
MIN_PRIORITY, MAX_PRIORITY = -1000, 1000
MAX_NAME_LENGTH = 64
MAX_BYTES = 1 << 60  # sums of it fit into a word of a ledger
MAX_SECONDS = 10**9  # about 31 years; locks, and clocks in nanoseconds, count to some more

_FACTORS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1 << 40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*|%)", re.IGNORECASE)
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME_LENGTH - 1}}}")


def default_directory() -> Path:
    """Return the folder of the ledgers when nothing else is set."""
    return Path(f"/dev/shm/kvcached-{os.geteuid()}")  # noqa: S108  made 0700 and checked on open


def check_name(name: str, what: str = "name") -> None:
    """Refuse what is no name of an instance.

    Args:
        name: The name.
        what: The setting or option that it came from, for the message.

    Raises:
        ConfigError: With what is allowed.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what}={name!r} is not allowed; use letters, digits, '.', '_' and '-', up to "
            f"{MAX_NAME_LENGTH}, starting with a letter or digit"
        )


def parse_bytes(text: str, *, what: str, whole_bytes: int | None = None) -> int:
    """Return the bytes that `text` means, such as `24GiB`, `512 MiB`, `1073741824` or `50%`.

    Args:
        text: The size. `KiB`/`MiB`/`GiB`/`TiB` are powers of 1024, `kB`/`MB`/`GB`/`TB` of 1000.
        what: The setting's name, for the error message.
        whole_bytes: What 100 % is; without it a percentage is refused.

    Raises:
        ConfigError: If the text is no size, or none that can be counted.
    """
    match = _SIZE.fullmatch(text.strip())
    if match:
        number, unit = Decimal(match[1]), match[2].lower()
        if unit == "%" and whole_bytes is not None and number <= ALL_PERCENT:
            return int(whole_bytes * number / ALL_PERCENT)
        if unit in _FACTORS:
            num_bytes = number * _FACTORS[unit]
            if num_bytes <= MAX_BYTES:
                return int(num_bytes)
            raise ConfigError(
                f"{what}={text!r} is too large; use at most {format_bytes(MAX_BYTES)}"
            )
    percent = " or a share such as 50%" if whole_bytes is not None else ""
    raise ConfigError(f"{what}={text!r} is not a size; write one such as 24GiB, 512MiB{percent}")


def format_bytes(num_bytes: float) -> str:
    """Return `num_bytes` as people read it, in powers of 1024: `1.5 GiB`."""
    size, unit = scale_bytes(num_bytes)
    return f"{size:.2f}".rstrip("0").rstrip(".") + f" {unit}"


def scale_bytes(num_bytes: float) -> tuple[float, str]:
    """Return `num_bytes` in the largest unit up to GiB in which it is at least 1, and the unit."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if abs(size) < KIB:
            break
        size, unit = size / KIB, larger
    return size, unit
