"""Engines whose threads' pace changes nothing.

Bells are heard when their test says so, and pages are mapped and unmapped before an order returns.
"""

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

from helpers.waiting import PATIENCE_SECONDS
from kvcached_core.engine import instance
from kvcached_core.ledger import bell
from kvcached_core.ledger.bell import Doorbell
from kvcached_core.memory import rank
from kvcached_core.memory.keeper import PageKeeper
from kvcached_core.memory.vmm.backend import Fence

_RING = bell.ring


class HeardBell(Doorbell):
    """A bell of this process whose rings wait for `hear`.

    Attributes:
        at: All there are, by their paths.
        rung: Those that were rung since it was asked last.
    """

    at: ClassVar[dict[Path, "HeardBell"]] = {}
    rung: ClassVar[dict[Path, None]] = {}

    def __init__(self, path: Path, on_ring: Callable[[], None]) -> None:
        self.heard = threading.Semaphore(0)

        def hear() -> None:
            on_ring()
            self.heard.release()

        self.alarm_seconds: float | None = None
        super().__init__(path, hear)
        self.at[path] = self

    def set_alarm(self, seconds: float) -> None:
        self.alarm_seconds = time.monotonic() + seconds

    def close(self) -> None:
        del self.at[self.path]
        super().close()

    @classmethod
    def hear(cls) -> None:
        """Let all hear that were rung, or whose alarm is over, in the order of their names.

        Not in that of the rings: threads of one engine ring beside each other.
        """
        for path, each in cls.at.items():
            if each.alarm_seconds is not None and each.alarm_seconds <= time.monotonic():
                each.alarm_seconds = None
                cls.rung[path] = None
        rung = sorted(cls.rung)
        cls.rung.clear()
        for path in rung:
            if _RING(path):
                assert cls.at[path].heard.acquire(timeout=PATIENCE_SECONDS)


def ring(path: Path) -> bool:
    """Stand for `bell.ring` where every bell is one of this process."""
    HeardBell.rung[path] = None
    return path in HeardBell.at


class PromptKeeper(PageKeeper):
    """A keeper that is at rest behind each order: neighbours never see half of one."""

    def map_soon(self, pages: Iterable[int]) -> None:
        super().map_soon(pages)
        self.wait()

    def unmap_behind(self, pages: Iterable[int], fence: Fence) -> None:
        super().unmap_behind(pages, fence)
        self.wait()


def let_no_pace_count(put: Callable[[object, str, object], None] = setattr) -> None:
    """Let later engines of this process have such bells, and such keepers of pages.

    Args:
        put: Sets an attribute; a test has its `monkeypatch.setattr` undo it.
    """
    put(bell, "ring", ring)
    put(instance, "Doorbell", HeardBell)
    put(rank, "PageKeeper", PromptKeeper)
