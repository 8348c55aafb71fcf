"""Durations as people write and read them."""

import re

__all__ = ["DURATIONS", "duration", "parse_seconds"]

DURATIONS = "write a time such as 45s, 30m, 2h or 250ms"
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d|)")


def parse_seconds(text: str) -> float:
    """Return the seconds that a duration means: `45s`, `30m`, `250ms`, or plain seconds.

    Raises:
        ValueError: If it is no duration.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(DURATIONS)
    return float(match[1]) * _SECONDS[match[2]]


def duration(seconds: float) -> str:
    """Return a duration in at most five characters: `0.3s`, `12s`, `5m`, `3h`, `12d`."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"  # noqa: PLR2004  two digits
