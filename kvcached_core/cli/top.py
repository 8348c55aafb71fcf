"""The picture of `kvcached top`."""

import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvcached_core.ledger import DeviceView, InstanceView
from kvcached_core.units import format_bytes

BAR_WIDTH = 40
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


def picture(devices: list[DeviceView]) -> RenderableType:
    """Return one table for each device: resident = used + cached + idle, limit, free."""
    if not devices:
        return Text("no instance runs")
    return Group(*(_table(view) for view in devices))


def watch(console: Console, read: Callable[[], list[DeviceView]], interval_seconds: float) -> None:
    """Redraw until Ctrl-C."""
    with Live(picture(read()), console=console, auto_refresh=False, screen=True) as live:
        try:
            while True:
                time.sleep(interval_seconds)
                live.update(picture(read()), refresh=True)
        except KeyboardInterrupt:
            return


def _table(view: DeviceView) -> Table:
    title = (
        f"{view.device}: {format_bytes(view.free_bytes)} free of "
        f"{format_bytes(view.capacity_bytes)}"
    )
    table = Table(title=title, title_justify="left", caption=_legend(), caption_justify="left")
    table.add_column("instance")
    table.add_column("memory")
    for name in ("resident", "used", "cached", "idle", "promised", "limit"):
        table.add_column(name, justify="right")
    for instance in view.instances:
        sizes = (
            instance.resident_bytes,
            instance.used_bytes,
            instance.cached_bytes,
            instance.idle_bytes,
            instance.promised_bytes,
        )
        limit = "none" if instance.limit_bytes is None else format_bytes(instance.limit_bytes)
        table.add_row(
            f"{instance.name}\n[dim]{instance.engine}, pid {instance.pid}[/dim]",
            bar(view.capacity_bytes, instance),
            *(format_bytes(size) for size in sizes),
            limit,
        )
    return table


def _legend() -> Text:
    return Text.assemble(("█ used ", USED), ("█ cached ", CACHED), ("█ idle", IDLE))
