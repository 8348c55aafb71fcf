"""Whether the process that wrote something down is still the one that runs under its pid."""

from pathlib import Path

_START_TIME_FIELD = 21
_STATE_FIELD = 2


def start_time(pid: int) -> int:
    """Return when `pid` started, in clock ticks since boot, or 0 if it does not run."""
    fields = _stat_fields(pid)
    return int(fields[_START_TIME_FIELD]) if fields else 0


def is_alive(pid: int, started: int) -> bool:
    """Return whether `pid` runs and is the process that started at `started`, not a later one."""
    fields = _stat_fields(pid)
    if not fields or fields[_STATE_FIELD] in "ZX":
        return False
    return int(fields[_START_TIME_FIELD]) == started


def _stat_fields(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    # The second field is the program's name in parentheses; it may hold spaces and parentheses.
    head, _, tail = text.rpartition(")")
    return [head.split(" ", 1)[0], head, *tail.split()]
