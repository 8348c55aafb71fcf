"""Asking instances for memory from outside, and waiting for their answer."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcached_core.errors import LedgerError
from kvcached_core.ledger import InstanceView, Ledger, doorbell_path
from kvcached_core.pressure import ring

LOOK_SECONDS = 0.01


@dataclass(frozen=True)
class TrimResult:
    """What one instance gave.

    Attributes:
        name: The instance.
        before_bytes: Resident bytes when it was asked.
        after_bytes: Resident bytes when it had answered, or when the time was up.
        is_done: Whether it answered in time.
    """

    name: str
    before_bytes: int
    after_bytes: int
    is_done: bool


def trim_instances(
    directory: Path, names: Sequence[str], *, keep_bytes: int, timeout_seconds: float
) -> list[TrimResult]:
    """Ask the named instances, or all, for all but `keep_bytes` of what their requests do not need.

    Raises:
        LedgerError: If a name is unknown; then nobody was asked.
    """
    ledgers = [Ledger(path) for path in sorted(directory.glob("*.ledger"))]
    try:
        found = [(ledger, view) for ledger in ledgers for view in ledger.view().instances]
        known = {view.name for _, view in found}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise LedgerError(
                f"no instance is named {', '.join(map(repr, unknown))}; "
                f"there are {', '.join(sorted(known)) or 'none'}"
            )
        deadline = time.monotonic() + timeout_seconds
        chosen = [(ledger, view) for ledger, view in found if not names or view.name in names]
        for ledger, view in chosen:
            if ledger.ask(view.row, view.resident_bytes - view.used_bytes - keep_bytes):
                ring(doorbell_path(ledger.path, view.row))
        return [_wait(ledger, view, deadline) for ledger, view in chosen]
    finally:
        for ledger in ledgers:
            ledger.close()


def _wait(ledger: Ledger, before: InstanceView, deadline: float) -> TrimResult:
    while True:
        now = next((view for view in ledger.view().instances if view.row == before.row), None)
        after_bytes = now.resident_bytes if now else 0
        is_done = now is None or not (now.asked_bytes or now.coming_bytes)
        if is_done or time.monotonic() >= deadline:
            return TrimResult(before.name, before.resident_bytes, after_bytes, is_done)
        time.sleep(LOOK_SECONDS)
