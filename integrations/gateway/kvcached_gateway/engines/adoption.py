"""Whether an engine that an earlier gateway left is still what was written down of it."""

import asyncio
from pathlib import Path

from kvcached_core.errors import KVCachedError
from kvcached_core.ledger.survey import survey
from kvcached_gateway.engines.engine import Engine
from kvcached_gateway.engines.process import EngineProcess, adopt
from kvcached_gateway.engines.state_file import EngineRecord
from kvcached_gateway.errors import AdoptionError

__all__ = ["check", "identify"]


async def identify(record: EngineRecord, directory: Path) -> EngineProcess:
    """Return the processes of an engine that still runs.

    Args:
        record: What was written down of it.
        directory: The folder of the ledgers.

    Raises:
        AdoptionError: If its first process has ended, its socket is gone, or it is elastic and no
            ledger has it.
    """
    await asyncio.to_thread(_check_files, record, directory)
    return adopt(record.identity)


async def check(engine: Engine) -> None:
    """See that an engine serves its model, and computes what it did.

    Raises:
        AdoptionError: If it serves another model.
        EngineStartError: If it answers the known question in another way.
        EngineDiedError: If it does not answer.
    """
    names, _ = await asyncio.gather(engine.served_names(), engine.verify())
    if engine.settings.id not in names:
        raise AdoptionError(f"it serves {', '.join(sorted(names)) or 'nothing'}")


def _check_files(record: EngineRecord, directory: Path) -> None:
    socket = record.address.socket
    if socket is not None and not Path(socket).is_socket():
        raise AdoptionError(f"its socket {socket} is gone")
    if record.is_elastic and not _is_in_a_ledger(record, directory):
        raise AdoptionError(f"no ledger in {directory} has an instance {record.instance_name!r}")


def _is_in_a_ledger(record: EngineRecord, directory: Path) -> bool:
    try:
        found = survey(directory)
    except KVCachedError:
        return False
    return any(
        instance.name == record.instance_name
        for device in found.devices
        for instance in device.instances
    )
