"""All the ledgers of a folder, as who runs no engine opens and sees them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kvcached_core.errors import BackendError, LedgerError
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.nvml import GPU_PREFIXES, free_memory_reader
from kvcached_core.ledger.opening import ledger_paths
from kvcached_core.ledger.view import DeviceView


@dataclass(frozen=True)
class Survey:
    """What can be seen of a folder.

    Attributes:
        devices: Every device whose ledger can be read.
        problems: Why others cannot, each with what to do.
    """

    devices: list[DeviceView]
    problems: list[str]


def survey(directory: Path) -> Survey:
    """Look at every ledger in `directory`; one that cannot be read hides none of the others.

    It takes no lock of a ledger that is whole.

    Raises:
        LedgerError: If the folder is not ours, or others may look into it.
    """
    found = Survey([], [])
    for path in ledger_paths(directory):
        try:
            with _open(path) as ledger:
                found.devices.append(ledger.view())
        except LedgerError as error:
            if not _is_gone(error):
                found.problems.append(str(error))
    return found


@contextmanager
def open_ledgers(directory: Path) -> Iterator[list[Ledger]]:
    """Open every ledger in `directory` for a block.

    Raises:
        LedgerError: If one of them cannot be used; then none is open.
    """
    with ExitStack() as stack:
        ledgers = []
        for path in ledger_paths(directory):
            try:
                ledgers.append(stack.enter_context(_open(path)))
            except LedgerError as error:
                if not _is_gone(error):
                    raise
        yield ledgers


def _open(path: Path) -> Ledger:
    read = None
    if path.stem.startswith(GPU_PREFIXES):
        with suppress(BackendError):
            read = free_memory_reader(path.stem)
    return Ledger(path, free_bytes=read)


def _is_gone(error: LedgerError) -> bool:
    """Return whether the last engine left, and with it the file, since the folder was read."""
    return isinstance(error.__cause__, FileNotFoundError)
