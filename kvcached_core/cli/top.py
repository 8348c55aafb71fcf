"""The picture of `kvcached top`."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from math import ceil

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvcached_core.ledger_view import DeviceView, InstanceView
from kvcached_core.units import format_bytes

BAR_WIDTH = 30
CURVE = " ▁▂▃▄▅▆▇█"
CURVE_WIDTH = 24
USED, CACHED, IDLE, FREE = "green", "yellow", "bright_black", "grey23"


def bar(capacity_bytes: int, instance: InstanceView, width: int = BAR_WIDTH) -> Text:
    """Return a bar of the device with the instance's used, cached and idle shares on it."""
    text = Text()
    drawn = 0
    total_bytes = 0
    for num_bytes, style in (
        (instance.used_bytes, USED),
        (instance.cached_bytes, CACHED),
        (instance.idle_bytes, IDLE),
    ):
        total_bytes += num_bytes
        end = round(width * total_bytes / max(capacity_bytes, 1))
        text.append("█" * (end - drawn), style)
        drawn = max(end, drawn)
    return text.append("·" * (width - drawn), FREE)


class History:
    """What was seen before: for the rates and the small curves."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, str], deque[tuple[float, InstanceView]]] = {}

    def add(self, devices: list[DeviceView], seconds: float) -> None:
        """Remember a sample that was taken at `seconds`."""
        seen = {(view.device, row.name): row for view in devices for row in view.instances}
        self._samples = {key: self._samples.get(key, deque(maxlen=CURVE_WIDTH)) for key in seen}
        for key, row in seen.items():
            self._samples[key].append((seconds, row))

    def rate(self, device: str, name: str) -> tuple[float, float] | None:
        """Return the bytes mapped and unmapped in a second, or None after one sample."""
        samples = list(self._samples.get((device, name), ()))
        if len(samples) < 2:  # noqa: PLR2004  a rate needs two
            return None
        (start, first), (end, last) = samples[-2], samples[-1]
        passed = max(end - start, 1e-9)
        mapped = last.num_mapped_bytes - first.num_mapped_bytes
        return mapped / passed, (last.num_unmapped_bytes - first.num_unmapped_bytes) / passed

    def curve(self, device: str, name: str, capacity_bytes: int) -> str:
        """Return the resident bytes so far as a line of blocks."""
        samples = self._samples.get((device, name), ())
        highest = len(CURVE) - 1
        return "".join(
            CURVE[min(ceil(highest * row.resident_bytes / max(capacity_bytes, 1)), highest)]
            for _, row in samples
        )


def picture(devices: list[DeviceView], history: History | None = None) -> RenderableType:
    """Return one table for each device: resident = used + cached + idle, and who may have what."""
    if not devices:
        return Text("no instance runs")
    return Group(*(_table(view, history) for view in devices))


def watch(console: Console, read: Callable[[], list[DeviceView]], interval_seconds: float) -> None:
    """Redraw until Ctrl-C."""
    history = History()

    def next_picture() -> RenderableType:
        devices = read()
        history.add(devices, time.monotonic())
        return picture(devices, history)

    with Live(next_picture(), console=console, auto_refresh=False, screen=True) as live:
        try:
            while True:
                time.sleep(interval_seconds)
                live.update(next_picture(), refresh=True)
        except KeyboardInterrupt:
            return


def _table(view: DeviceView, history: History | None) -> Table:
    title = (
        f"{view.device}: {format_bytes(view.free_bytes)} free of "
        f"{format_bytes(view.capacity_bytes)}"
    )
    table = Table(title=title, title_justify="left", caption=_legend(), caption_justify="left")
    table.add_column("instance")
    table.add_column("memory")
    for name in ("resident", "used", "cached", "idle", "promised"):
        table.add_column(name, justify="right")
    for name in ("limit", "floor", "priority", "pressure"):
        table.add_column(name, justify="right")
    if history is not None:
        table.add_column("mapped/s", justify="right")
        table.add_column("so far")
    for row in view.instances:
        table.add_row(*_cells(view, row), *_past(view, row, history))
    return table


def _cells(view: DeviceView, row: InstanceView) -> Iterator[RenderableType]:
    yield f"{row.name}\n[dim]{row.engine}, pid {row.pid}[/dim]"
    yield bar(view.capacity_bytes, row)
    for size in (
        row.resident_bytes,
        row.used_bytes,
        row.cached_bytes,
        row.idle_bytes,
        row.promised_bytes,
    ):
        yield format_bytes(size)
    yield "none" if row.limit_bytes is None else format_bytes(row.limit_bytes)
    yield format_bytes(row.floor_bytes) if row.floor_bytes else "none"
    yield str(row.priority)
    waits = f"\nwaits for {format_bytes(row.waiting_bytes)}" if row.waiting_bytes else ""
    yield f"asked {row.num_asked}, refused {row.num_refused}{waits}"


def _past(view: DeviceView, row: InstanceView, history: History | None) -> Iterator[str]:
    if history is None:
        return
    rate = history.rate(view.device, row.name)
    yield "" if rate is None else f"+{format_bytes(rate[0])}\n-{format_bytes(rate[1])}"
    yield history.curve(view.device, row.name, view.capacity_bytes)


def _legend() -> Text:
    return Text.assemble(
        ("█ used ", USED),
        ("█ cached ", CACHED),
        ("█ idle", IDLE),
        "; pressure: times others asked it for memory, times it was refused some",
    )
