"""The pool of engines on the host beside what else of ours takes host memory."""

from pathlib import Path

from kvcached_core.config import HOST, PREFIX, Config
from kvcached_core.errors import HostBudgetError, LedgerError
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.units import format_bytes
from kvcached_core.weights.copies_folder import read_holders

POOL = f"{PREFIX}HOST_POOL"


def pool_in_use(directory: Path) -> int:
    """Return what engines on the host may hold together, in bytes; 0 while there is none.

    Args:
        directory: The folder of the ledgers.
    """
    try:
        with Ledger(directory / f"{HOST}.ledger") as ledger:
            view = ledger.view()
    except LedgerError:  # most often there is none; who needs it says what is wrong with it
        return 0
    return view.capacity_bytes if view.instances else 0


def check_pool(config: Config, pool_bytes: int, usable_bytes: int) -> None:
    """See that the host has room for a pool that nobody uses yet, beside copies and tiers in use.

    Args:
        config: The settings.
        pool_bytes: What engines on the host may hold together.
        usable_bytes: What this process may use of the host's memory.

    Raises:
        HostBudgetError: If it has not; the message says who has how much, and what to set.
    """
    held = [one for one in read_holders(config.copies_dir) if one.is_used]
    left_bytes = usable_bytes - sum(one.num_bytes for one in held)
    if held and pool_bytes > left_bytes and not pool_in_use(config.dir):
        shares = ", ".join(f"{one.name} {format_bytes(one.num_bytes)}" for one in held)
        raise HostBudgetError(
            f"{POOL}={format_bytes(pool_bytes)} is more than is left of the "
            f"{format_bytes(usable_bytes)} of host memory that may be used: {shares} is in use; "
            f"lower {POOL}, or stop who has it",
            pool_bytes,
            max(left_bytes, 0),
        )
