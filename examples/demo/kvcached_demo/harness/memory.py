"""Recording who held how much, while the demo runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import DeviceView
from kvcached_demo.harness.background import Background

SAMPLE_SECONDS = 0.05


@dataclass
class Recording:
    """Samples of one device.

    Attributes:
        seconds: When each sample was taken, from the start.
        views: What the ledger said.
        marks: When each phase began, and its name.
    """

    seconds: list[float] = field(default_factory=list)
    views: list[DeviceView] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)

    def peak_bytes(self, name: str) -> int:
        """Return the most that `name` held."""
        return max(self.resident_bytes(name), default=0)

    def resident_bytes(self, name: str) -> list[int]:
        """Return what `name` held at each sample."""
        return [
            next((row.resident_bytes for row in view.instances if row.name == name), 0)
            for view in self.views
        ]


class Recorder(Background):
    """Samples a ledger in a thread of its own until its block ends.

    Args:
        open_ledger: Opens the ledger.
    """

    def __init__(self, open_ledger: Callable[[], Ledger]) -> None:
        super().__init__()
        self._open_ledger = open_ledger
        self.recording = Recording()
        self._start = time.monotonic()

    def mark(self, name: str) -> None:
        """Say that a phase begins now."""
        self.recording.marks.append((time.monotonic() - self._start, name))

    def latest(self) -> DeviceView | None:
        """Return the newest sample."""
        return self.recording.views[-1] if self.recording.views else None

    def _run(self) -> None:
        while not self._end.wait(SAMPLE_SECONDS):
            try:
                with self._open_ledger() as ledger:
                    view = ledger.view()
            except LedgerError:
                continue  # no engine has made it yet, or the last one left
            self.recording.views.append(view)
            self.recording.seconds.append(time.monotonic() - self._start)
