"""What of a Ray worker's variables is meant for the gateway and its engines."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.units import default_directory

__all__ = ["engine_variables", "own_directory", "take_plain_priority"]

# Ray gives a worker as many threads as it has CPUs of Ray's, and hides GPUs that are not its own.
# The gateway's engines are no workers: the file of models says what they get.
RAYS_OWN = frozenset({"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONBREAKPOINT"})
PREFIX = "RAY_"


def engine_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables of this worker without those that Ray set for it."""
    return {
        name: value
        for name, value in environ.items()
        if name not in RAYS_OWN and not name.startswith(PREFIX)
    }


def take_plain_priority() -> bool:
    """Give this process, and engines that it starts, a usual share of the CPU; say whether it has.

    Ray starts its workers with the least (`RAY_worker_niceness`), and only root may take more.
    """
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    return os.getpriority(os.PRIO_PROCESS, 0) == 0


def own_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Return this node's folder of ledgers: `KVCACHED_DIR`, as `ray start` was told it.

    It is made here, for this user alone: what makes a folder inside it would make it open to all.

    Raises:
        LedgerError: If it cannot be made, is not ours, or others may look into it.
    """
    return ledger_directory(Path(environ.get("KVCACHED_DIR") or default_directory()))
