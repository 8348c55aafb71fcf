"""`kvcached top` on a terminal: the picture, drawn again and again."""

import signal
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.live import Live

from kvcached_core.cli.added import Added
from kvcached_core.cli.history import History
from kvcached_core.cli.picture import Picture
from kvcached_core.ledger.survey import Survey


def watch(
    console: Console,
    read: Callable[[], tuple[Survey, Sequence[Added]]],
    interval_seconds: float,
) -> None:
    """Redraw until Ctrl-C, SIGTERM or SIGHUP; the terminal is left as it was."""
    history = History()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)

    def next_picture() -> Picture:
        found, said = read()
        history.add(found.devices, time.monotonic())
        return Picture(found.devices, history, found.problems, said)

    with Live(next_picture(), console=console, auto_refresh=False, screen=True) as live:
        try:
            while True:
                time.sleep(interval_seconds)
                live.update(next_picture(), refresh=True)
        except KeyboardInterrupt:
            return
