"""Times as people read them."""


def duration(seconds: float) -> str:
    """Return a time in at most five characters: `0.3s`, `12s`, `5m`, `3h`, `12d`."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"  # noqa: PLR2004  two digits
