"""Host copies that those who have them would let go: a socket beside each, which others ring."""

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from kvcached_core.ledger.bell import ring
from kvcached_core.weights.copies_folder import is_used

BELL = ".bell"
# How long whoever rang waits: a disk that writes 100 MB a second takes 30 GB in that time.
PATIENCE_SECONDS = 300.0
_LOOK_SECONDS = 0.02
_DIGITS = 12  # of a key, so that the address of a socket is short enough

_numbers = itertools.count()


def bell_of(image: Path) -> Path:
    """Return where this process listens for an image that it would let go."""
    name = f"{image.stem[:_DIGITS]}-{os.getpid()}-{next(_numbers)}{BELL}"
    return image.with_name(name)


def is_offered(image: Path) -> bool:
    """Return whether somebody who has an image would let it go."""
    return next(_bells(image), None) is not None


def ask_for(image: Path) -> str:
    """Have those who offer an image let it go.

    Returns:
        Why they have not answered; nothing when each has let it go, or has begun to read it.
    """
    rung = list(_bells(image))
    for bell in rung:
        if not ring(bell):
            bell.unlink(missing_ok=True)  # whoever listened there was ended
    deadline = time.monotonic() + PATIENCE_SECONDS
    while is_used(image) and any(bell.exists() for bell in rung):
        if time.monotonic() >= deadline:
            return f"whoever has {image} does not let it go"
        time.sleep(_LOOK_SECONDS)
    return ""


def _bells(image: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from image.parent.glob(f"{image.stem[:_DIGITS]}-*{BELL}")
