"""What the file of models writes as text: sizes, times of the week, durations."""

import functools
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated
from zoneinfo import ZoneInfo

from pydantic import BeforeValidator

from kvcached_core.errors import ConfigError
from kvcached_core.units import parse_bytes
from kvcached_gateway.settings.durations import parse_seconds

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WARM_TIME = re.compile(
    r"(?P<days>\S+) (?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?: (?P<zone>\S+))?"
)
_LAST_HOUR, _LAST_MINUTE = 23, 59
SIZES = "write a size such as 24GiB or 512MiB"
WARM_TIMES = "write days, a time and a zone, such as 'mon-fri 07:50 Europe/Berlin' or 'daily 6:30'"


@dataclass(frozen=True)
class WarmTime:
    """A time of the week at which a model shall be warm.

    Attributes:
        days: The days, 0 for Monday.
        hour: The hour, 0 to 23.
        minute: The minute.
        zone: The time zone, or None for the machine's own.
    """

    days: frozenset[int]
    hour: int
    minute: int
    zone: ZoneInfo | None

    def is_at(self, moment: datetime) -> bool:
        """Return whether it is this minute in an aware `moment`."""
        local = moment.astimezone(self.zone)
        return local.weekday() in self.days and (local.hour, local.minute) == (
            self.hour,
            self.minute,
        )


@functools.cache  # the controller asks twice a second, of each model
def parse_warm_time(text: str) -> WarmTime:
    """Return the time of the week that a text means: `mon-fri 07:50 Europe/Berlin`.

    Raises:
        ValueError: If it is none, or nobody knows its zone.
    """
    match = _WARM_TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(WARM_TIMES)
    hour, minute = int(match["hour"]), int(match["minute"])
    if hour > _LAST_HOUR or minute > _LAST_MINUTE:
        raise ValueError(WARM_TIMES)
    try:
        zone = None if match["zone"] is None else ZoneInfo(match["zone"])
    except (KeyError, ValueError, OSError):  # what zoneinfo raises for names of other shapes
        raise ValueError(f"no time zone is named {match['zone']!r}; {WARM_TIMES}") from None
    return WarmTime(_days(match["days"].lower()), hour, minute, zone)


def _days(text: str) -> frozenset[int]:
    if text == "daily":
        return frozenset(range(len(_DAYS)))
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if first not in _DAYS or (dash and last not in _DAYS):
            raise ValueError(WARM_TIMES)
        begin = _DAYS.index(first)
        end = _DAYS.index(last) if dash else begin
        found.update((begin + step) % len(_DAYS) for step in range((end - begin) % len(_DAYS) + 1))
    return frozenset(found)


def _seconds(value: object) -> object:
    if isinstance(value, float | int):
        return value
    return parse_seconds(value if isinstance(value, str) else "")


def _size(value: object) -> object:
    if isinstance(value, int):
        return value
    try:
        return parse_bytes(value if isinstance(value, str) else "", what="")
    except ConfigError:
        raise ValueError(SIZES) from None


def _size_or_share(value: object) -> object:
    if isinstance(value, int) or value == "none":
        return value
    text = value if isinstance(value, str) else ""
    try:
        num_bytes = parse_bytes(text, what="", whole_bytes=100)
    except ConfigError:
        raise ValueError(f"{SIZES}, a share such as 50%, or none") from None
    return text if text.strip().endswith("%") else num_bytes


def _warm_time(value: object) -> object:
    if isinstance(value, str):
        parse_warm_time(value)
    return value


Seconds = Annotated[float, BeforeValidator(_seconds)]
Size = Annotated[int, BeforeValidator(_size)]
# A share, and 'none', stay text: the engine that gets them knows of what.
SizeOrShare = Annotated[int | str, BeforeValidator(_size_or_share)]
WarmTimeText = Annotated[str, BeforeValidator(_warm_time)]
