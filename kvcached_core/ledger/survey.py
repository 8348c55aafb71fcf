"""All the ledgers of a folder, as who runs no engine opens and sees them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kvcached_core.errors import BackendError, LedgerError
from kvcached_core.ledger import bell
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.nvml import GPU_PREFIXES, free_memory_reader
from kvcached_core.ledger.opening import ledger_paths
from kvcached_core.ledger.view import DeviceView, InstanceView
from kvcached_core.units import check_name


@dataclass(frozen=True)
class Survey:
    """What can be seen of a folder.

    Attributes:
        devices: Every device whose ledger can be read.
        problems: Why others cannot, each with what to do.
    """

    devices: list[DeviceView]
    problems: list[str]


@dataclass(frozen=True)
class Place:
    """An instance's row in one ledger."""

    ledger: Ledger
    view: InstanceView

    def now(self) -> InstanceView | None:
        """Return the row as it is now, or None if the instance is gone."""
        views = self.ledger.view().instances
        return next((view for view in views if view.row == self.view.row), None)

    def wake(self) -> None:
        """Ring the instance's bell."""
        bell.wake(self.ledger, [self.view.row])


@dataclass(frozen=True)
class OpenLedgers:
    """The ledgers of a folder that can be used.

    Attributes:
        views: Each of them, with what it said when it was opened.
        problems: Why others cannot be used, each with what to do.
    """

    views: list[tuple[Ledger, DeviceView]]
    problems: list[str]


def survey(directory: Path) -> Survey:
    """Look at every ledger in `directory`; one that cannot be read hides none of the others.

    It takes no lock of a ledger that is whole.

    Raises:
        LedgerError: If the folder is not ours, or others may look into it.
    """
    with open_ledgers(directory) as found:
        return Survey([view for _, view in found.views], found.problems)


@contextmanager
def open_ledgers(directory: Path) -> Iterator[OpenLedgers]:
    """Open every ledger in `directory` for a block; see `survey`.

    Raises:
        LedgerError: If the folder is not ours, or others may look into it.
    """
    with ExitStack() as stack:
        found = OpenLedgers([], [])
        for path in ledger_paths(directory):
            try:
                ledger = stack.enter_context(_open(path))
                found.views.append((ledger, ledger.view()))
            except LedgerError as error:
                if not _is_gone(error):
                    found.problems.append(str(error))
        yield found


@contextmanager
def open_places(directory: Path, names: Sequence[str]) -> Iterator[tuple[list[Place], list[str]]]:
    """Find instances for a block, with why ledgers cannot be used where they might be, too.

    Args:
        directory: The folder of the ledgers.
        names: The instances; all if none.

    Raises:
        LedgerError: If a name is unknown, or no ledger can be used.
    """
    for name in names:
        check_name(name)
    with open_ledgers(directory) as found:
        places = [Place(ledger, row) for ledger, view in found.views for row in view.instances]
        known = {place.view.name for place in places}
        reasons = list(found.problems)
        unknown = [name for name in names if name not in known]
        if unknown:
            there = ", ".join(sorted(known)) or "none"
            wanted = ", ".join(map(repr, unknown))
            reasons = [f"no instance is named {wanted}; there are {there}", *reasons]
        if reasons and (unknown or not places):
            raise LedgerError("; ".join(reasons))
        yield [place for place in places if not names or place.view.name in names], reasons


def _open(path: Path) -> Ledger:
    read = None
    if path.stem.startswith(GPU_PREFIXES):
        with suppress(BackendError):
            read = free_memory_reader(path.stem)
    return Ledger(path, free_bytes=read)


def _is_gone(error: LedgerError) -> bool:
    """Return whether the last engine left, and with it the file, since the folder was read."""
    return isinstance(error.__cause__, FileNotFoundError)
