"""The columns of `kvcached top`: what each says, how wide it is, which are left out first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor

from rich.text import Text

from kvcached_core.cli.added import Added
from kvcached_core.cli.history import CURVE_WIDTH, History
from kvcached_core.ledger.reach import pressure
from kvcached_core.ledger.view import DeviceView, InstanceView
from kvcached_core.units import KIB, scale_bytes

NAME_WIDTH = 14  # the least; names get what the other columns leave
SIZE_WIDTH = 8
BAR_WIDTH = 20
NUM_DIGITS = 3
_LETTERS = "BKMGT"
# A sign of its own for each state: without colours they must differ, too.
SIGNS, ASCII_SIGNS = "█▒░▚·", "#=-%."
STYLES = ("green", "yellow", "bright_black", "blue", "bright_black")
STATES = ("used", "cached", "idle", "weights", "free")
WEIGHTS_WIDTH = len("waking 100 %")


@dataclass(frozen=True)
class Seen:
    """What a column may show: an instance, its device, and what was seen before."""

    device: DeviceView
    row: InstanceView
    history: History
    is_ascii: bool
    said: Mapping[str, str] = field(default_factory=dict)  # by other packages, in columns of theirs


@dataclass(frozen=True)
class Column:
    """One column of a picture.

    Attributes:
        title: What stands above it.
        width: How wide it is.
        cell: Returns what it says of an instance.
        is_number: Whether it stands to the right.
        is_live: Whether it needs more than one sample.
    """

    title: str
    width: int
    cell: Callable[[Seen], Text | str]
    is_number: bool = True
    is_live: bool = False


def short_bytes(num_bytes: float) -> str:
    """Return a size in three digits and at most eight characters: `1.23 GiB`, `1000 MiB`."""
    size, unit = scale_bytes(num_bytes)
    num_decimals = _num_decimals(size, NUM_DIGITS)
    text = f"{size:.{num_decimals}f}"
    return f"{text.rstrip('0').rstrip('.') if num_decimals else text} {unit}"


def weights_text(instance: InstanceView) -> str:
    """Return how much of an instance's weights is resident: `15.0G`, `7.2/15G`, `waking 60 %`.

    `-` is for weights that never yield, and for a program, which has none.
    """
    if instance.is_program:
        return "-"
    there = instance.weights_bytes
    needed = max(instance.weights_needed_bytes, there)
    if not needed:
        return "-"
    if instance.is_waking:
        return f"waking {100 * there // needed} %"
    power = max(number for number in range(len(_LETTERS)) if needed >= KIB**number)
    unit, letter = KIB**power, _LETTERS[power]
    if there == needed:
        return f"{needed / unit:.{_num_decimals(needed / unit, NUM_DIGITS)}f}{letter}"
    sizes = (f"{size / unit:.{_num_decimals(size / unit, 2)}f}" for size in (there, needed))
    return "/".join(sizes) + letter


def _num_decimals(size: float, num_digits: int) -> int:
    return max(num_digits - len(str(int(abs(size)))), 0) if size else 0


def shortened(text: str, width: int, *, is_ascii: bool = False) -> str:
    """Return `text` in at most `width` characters; its beginning and its end tell it apart."""
    if len(text) <= width:
        return text
    num_last = (width - 1) // 2
    sign = "~" if is_ascii else "…"
    return f"{text[: width - 1 - num_last]}{sign}{text[len(text) - num_last :]}"


def bar(
    capacity_bytes: int, instance: InstanceView, width: int = BAR_WIDTH, *, is_ascii: bool = False
) -> Text:
    """Return a bar of the device with the instance's used, cached, idle and weights' shares."""
    signs = ASCII_SIGNS if is_ascii else SIGNS
    kv = (instance.used_bytes, instance.cached_bytes, instance.idle_bytes)
    sizes = (*kv, instance.weights_bytes)
    text = Text()
    total_bytes = 0
    for num_bytes, sign, style in zip(sizes, signs, STYLES, strict=False):
        total_bytes += num_bytes
        end = min(round(width * total_bytes / max(capacity_bytes, 1)), width)
        text.append(sign * (end - len(text)), style)
    return text.append(signs[-1] * (width - len(text)), STYLES[-1])


def _size(title: str, read: Callable[[InstanceView], int | None], *, zero: str = "0 B") -> Column:
    def cell(seen: Seen) -> str:
        size = read(seen.row)
        return "none" if size is None else short_bytes(size) if size else zero

    return Column(title, SIZE_WIDTH, cell)


def _curve(seen: Seen) -> str:
    device, capacity_bytes = seen.device.device, seen.device.capacity_bytes
    return seen.history.curve(device, seen.row.name, capacity_bytes, is_ascii=seen.is_ascii)


def _pressure(seen: Seen) -> str:
    if seen.row.is_program:
        return "-"
    return f"{floor(100 * pressure(seen.device, seen.row))} %"


def _rate(index: int, sign: str) -> Callable[[Seen], str]:
    def cell(seen: Seen) -> str:
        rate = seen.history.rate(seen.device.device, seen.row.name)
        return "" if rate is None else sign + short_bytes(rate[index])

    return cell


INSTANCE = Column("instance", NAME_WIDTH, lambda seen: seen.row.name, is_number=False)
MEMORY = Column(
    "memory",
    BAR_WIDTH,
    lambda seen: bar(seen.device.capacity_bytes, seen.row, is_ascii=seen.is_ascii),
    is_number=False,
)
WEIGHTS = Column("weights", WEIGHTS_WIDTH, lambda seen: weights_text(seen.row))
# From left to right, and the order in which they are added as there is room.
COLUMNS: dict[float, Column] = {
    1: INSTANCE,
    8: MEMORY,
    2: _size("resident", lambda row: row.resident_bytes),
    3: _size("used", lambda row: row.used_bytes),
    4: _size("cached", lambda row: row.cached_bytes),
    5: _size("idle", lambda row: row.idle_bytes),
    7: WEIGHTS,
    6: Column("pressure", SIZE_WIDTH, _pressure),
    13: _size("promised", lambda row: row.taken_bytes - row.resident_bytes),
    10: _size("limit", lambda row: row.limit_bytes),
    11: _size("floor", lambda row: row.floor_bytes, zero="none"),
    14: Column("priority", 8, lambda seen: str(seen.row.priority)),
    9: _size("waiting", lambda row: row.waiting_bytes, zero=""),
    15: Column("refused", 7, lambda seen: str(seen.row.num_refused)),
    16: Column("asked", 7, lambda seen: str(seen.row.num_asked)),
    17: Column("mapped/s", 9, _rate(0, "+"), is_live=True),
    18: Column("unmapped/s", 10, _rate(1, "-"), is_live=True),
    12: Column("so far", CURVE_WIDTH, _curve, is_number=False, is_live=True),
}
BEHIND_NUMBER = 3  # columns of other packages come where this one has its place


def added_columns(said: Sequence[Added]) -> list[Column]:
    """Return a column for each title that other packages have, as wide as what they say."""
    widths: dict[str, int] = {}
    for each in said:
        for title, text in each.cells.items():
            widths[title] = max(widths.get(title, len(title)), len(text))
    return [Column(title, width, _said(title)) for title, width in widths.items()]


def _said(title: str) -> Callable[[Seen], str]:
    return lambda seen: seen.said.get(title, "")
