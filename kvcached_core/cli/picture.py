"""The picture of `kvcached top`: as many columns as there is room for, none of them narrowed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.table import Table
from rich.text import Text

from kvcached_core.cli.added import Added
from kvcached_core.cli.columns import (
    ASCII_SIGNS,
    BEHIND_NUMBER,
    COLUMNS,
    INSTANCE,
    MEMORY,
    NAME_WIDTH,
    SIGNS,
    STATES,
    STYLES,
    WEIGHTS,
    Column,
    Seen,
    added_columns,
    bar,
    shortened,
)
from kvcached_core.cli.history import History
from kvcached_core.ledger.view import DeviceView, InstanceView
from kvcached_core.units import format_bytes

NOBODY = "no instance runs"
LONG_BAR_WIDTH = 40
LEAST_WIDTH = len("pid 4194304")  # which is as large as a pid gets


class Picture:
    """All devices and their instances: what is resident is for what, and who may have what.

    It is drawn for the terminal that it is printed on. Columns that do not fit are left out, the
    least important first. In a low terminal an instance has one line instead of two, and instances
    that do not fit are counted.

    Args:
        devices: What to show.
        history: What was seen before; None for a picture that stands alone.
        problems: What could not be seen, and why; a line each, as much of it as there is room for.
        said: What other packages say of instances, in columns of their own; those that are not
            there are named in one line.
    """

    def __init__(
        self,
        devices: Sequence[DeviceView],
        history: History | None = None,
        problems: Sequence[str] = (),
        said: Sequence[Added] = (),
    ) -> None:
        self._devices = [view for view in devices if view.instances]
        self._history = history
        self._problems = problems
        rows = [row for view in self._devices for row in view.instances]
        self._has_weights = any(
            row.weights_needed_bytes or (row.weights_bytes and not row.is_program) for row in rows
        )
        names = {row.name for row in rows}
        self._said = {each.instance: each.cells for each in said if each.instance in names}
        self._added = added_columns([each for each in said if each.instance in names])
        self._absent = _absent([each for each in said if each.instance not in names])

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the parts; rich calls it."""
        width, is_ascii = options.max_width, options.ascii_only
        for problem in self._problems:
            yield Text(shortened(problem, width, is_ascii=is_ascii), "red", no_wrap=True)
        if not self._devices:
            if not self._problems:
                yield Text(NOBODY)
            yield from self._absent_line(width, is_ascii=is_ascii)
            return
        columns = self._columns(width)
        lines_each, shown = self._fitting(options.height)
        yield _table(columns, show_header=True)
        for view, rows in shown:
            yield _title(view, width, is_ascii=is_ascii)
            for row in rows:
                said = self._said.get(row.name, {})
                seen = Seen(view, row, self._history or History(), is_ascii, said)
                yield _line(columns, seen)
                if lines_each > 1:
                    yield _second_line(columns, seen, width)
        num_shown = sum(len(rows) for _, rows in shown)
        num_left_out = sum(len(view.instances) for view in self._devices) - num_shown
        if num_left_out:
            yield Text(f"and {num_left_out} more, for which this terminal is too low", "dim")
        yield from self._absent_line(width, is_ascii=is_ascii)
        yield _legend(is_ascii=is_ascii, has_weights=self._has_weights)

    def _columns(self, width: int) -> list[Column]:
        longest = max(len(row.name) for view in self._devices for row in view.instances)
        chosen: dict[float, Column] = {
            1: replace(INSTANCE, width=min(max(longest, LEAST_WIDTH), NAME_WIDTH))
        }
        left = width - chosen[1].width
        step = 1 / (len(self._added) + 1)
        added: dict[float, Column] = {
            BEHIND_NUMBER + step * at: each for at, each in enumerate(self._added, start=1)
        }
        known: dict[float, Column] = {**COLUMNS, **added}
        for number, column in sorted(known.items()):
            if number in chosen or (column.is_live and self._history is None):
                continue
            if column is WEIGHTS and not self._has_weights:
                continue
            if column.width + 1 > left:
                break
            chosen[number] = column
            left -= column.width + 1
        name = chosen[1]
        chosen[1] = replace(name, width=min(max(longest, name.width), name.width + left))
        order = [1, *added, *(number for number in COLUMNS if number != 1)]
        return [chosen[number] for number in order if number in chosen]

    def _absent_line(self, width: int, *, is_ascii: bool) -> Iterator[Text]:
        if self._absent:
            yield Text(shortened(self._absent, width, is_ascii=is_ascii), "dim", no_wrap=True)

    def _fitting(
        self, height: int | None
    ) -> tuple[int, list[tuple[DeviceView, tuple[InstanceView, ...]]]]:
        """Return how many lines each instance gets, and those that fit."""
        rows = [(view, view.instances) for view in self._devices]
        num_rows = sum(len(view.instances) for view in self._devices)
        # The header, the legend, a title for each device.
        num_others = len(self._problems) + bool(self._absent)
        around = 2 + len(self._devices) + num_others
        for lines_each in (2, 1):
            if height is None or around + lines_each * num_rows <= height:
                return lines_each, rows
        # The header, the legend, and what is left out.
        left = height - 3 - num_others if height else 0
        shown = []
        for view, instances in rows:
            fitting = instances[: max(left - 1, 0)]
            if fitting:
                shown.append((view, fitting))
                left -= 1 + len(fitting)
        return 1, shown


def _absent(said: Sequence[Added]) -> str:
    by_state: dict[str, list[str]] = {}
    for each in said:
        by_state.setdefault(each.state, []).append(each.name)
    return "; ".join(f"{state}: {', '.join(names)}" for state, names in by_state.items())


def _table(columns: list[Column], *, show_header: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=show_header)
    for column in columns:
        justify: JustifyMethod = "right" if column.is_number else "left"
        table.add_column(column.title, width=column.width, justify=justify, no_wrap=True)
    return table


def _line(columns: list[Column], seen: Seen) -> Table:
    table = _table(columns, show_header=False)
    cells: list[Text] = []
    for column in columns:
        cell = column.cell(seen)
        if isinstance(cell, str):
            cell = Text(shortened(cell, column.width, is_ascii=seen.is_ascii))
        cells.append(cell)
    table.add_row(*cells)
    return table


def _second_line(columns: list[Column], seen: Seen, width: int) -> Text:
    left = columns[0].width
    if MEMORY in columns:
        text = f"pid {seen.row.pid}, {seen.row.engine}"
        return Text(shortened(text, width, is_ascii=seen.is_ascii), "dim")
    room = min(width - left - 1, LONG_BAR_WIDTH)
    drawn = bar(seen.device.capacity_bytes, seen.row, room, is_ascii=seen.is_ascii)
    pid = shortened(f"pid {seen.row.pid}", left, is_ascii=seen.is_ascii)
    return Text.assemble((f"{pid:<{left + 1}}", "dim"), drawn, no_wrap=True)


def _title(view: DeviceView, width: int, *, is_ascii: bool) -> Text:
    text = f": {format_bytes(view.free_bytes)} free of {format_bytes(view.capacity_bytes)}"
    device = shortened(view.device, max(width - len(text), 1), is_ascii=is_ascii)
    return Text(device + text, "italic", no_wrap=True)


def _legend(*, is_ascii: bool, has_weights: bool) -> Text:
    signs = ASCII_SIGNS if is_ascii else SIGNS
    parts = zip(signs, STATES, STYLES, strict=True)
    return Text.assemble(
        *(
            (f"{sign} {state}  ", style)
            for sign, state, style in parts
            if has_weights or state != WEIGHTS.title
        )
    )
