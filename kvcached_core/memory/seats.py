"""An engine's rows in the ledgers of its devices: taken on all of them, or on none."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from kvcached_core.config import Config
from kvcached_core.errors import LedgerError, NameTakenError
from kvcached_core.ledger.bell import wake
from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.policy import Policy
from kvcached_core.memory.devices import Device, open_ledger
from kvcached_core.memory.geometry import Geometry

logger = logging.getLogger("kvcached")


@dataclass(frozen=True)
class Seat:
    """Where a rank finds its device's ledger and its instance's row; travels to the workers.

    Attributes:
        ledger_path: The ledger of the rank's device.
        row: The instance's row in it, and that it is this instance's.
        num_ranks: Ranks of the instance on that device: each maps every page.
    """

    ledger_path: str
    row: RowKey
    num_ranks: int


@dataclass(frozen=True)
class Placement:
    """Where a rank's KV cache lies; travels to the workers.

    Attributes:
        geometry: This rank's geometry; ids and blocks per page are the same on all ranks.
        num_pages: Pages of the pool's virtual size.
        seat: The instance's row in the ledger of the rank's device.
    """

    geometry: Geometry
    num_pages: int
    seat: Seat


def open_ledgers(devices: Iterable[Device], config: Config) -> dict[Device, Ledger]:
    """Open the ledgers of `devices`, in an order that all engines keep.

    So two engines that share several devices never wait for each other.

    Raises:
        LedgerError: If one cannot be used; then none is open.
    """
    ledgers: dict[Device, Ledger] = {}
    try:
        for device in sorted(devices, key=lambda device: device.name):
            ledgers[device] = open_ledger(device, config)
    except BaseException:
        close_ledgers(ledgers)
        raise
    return ledgers


def close_ledgers(ledgers: Mapping[Device, Ledger]) -> None:
    """Close the ledgers again; the rows in them have to be left before."""
    for ledger in ledgers.values():
        ledger.close()


def take_rows(
    ledgers: Mapping[Device, Ledger], names: Iterable[str], *, engine: str, config: Config
) -> dict[Device, RowKey]:
    """Take a row on every device, under the first of the names that is free on all.

    Args:
        ledgers: The ledgers, in an order that all engines keep.
        names: What the instance may be called.
        engine: The engine and its release.
        config: The settings; they say limit, floor and priority.

    Raises:
        NameTakenError: If live instances have all the names.
        LedgerError: If a ledger cannot be used.
        ConfigError: If a size is above what a device has.
        PolicyError: If limit, floor or priority cannot be promised.
    """

    def register(device: Device, ledger: Ledger, name: str) -> RowKey:
        pool_bytes = device.capacity_bytes(config)
        limit_bytes, floor_bytes = config.limit_bytes(pool_bytes), config.floor_bytes(pool_bytes)
        return ledger.register(
            name=name,
            engine=engine,
            virtual_bytes=config.virtual_bytes(pool_bytes),
            policy=Policy(limit_bytes, floor_bytes, config.priority),
        )

    return take_under_one_name(ledgers, names, register)[1]


def take_under_one_name(
    ledgers: Mapping[Device, Ledger],
    names: Iterable[str],
    register: Callable[[Device, Ledger, str], RowKey],
) -> tuple[str, dict[Device, RowKey]]:
    """Take a row on every device, under the first of the names that is free on all.

    Args:
        ledgers: The ledgers, in an order that all who take rows keep.
        names: What they may be called.
        register: Takes the row of one device.

    Returns:
        The name, and the rows.

    Raises:
        NameTakenError: If live instances have all the names.
        LedgerError: If a ledger cannot be used. Nothing is taken after this, or any other error.
    """
    taken: NameTakenError | None = None
    for name in names:
        rows: dict[Device, RowKey] = {}
        try:
            for device, ledger in ledgers.items():
                rows[device] = register(device, ledger, name)
        except BaseException as error:
            leave_rows(ledgers, rows)
            if not isinstance(error, NameTakenError):
                raise
            taken = error
        else:
            return name, rows
    raise taken or LedgerError("an instance needs a name")


def leave_rows(ledgers: Mapping[Device, Ledger], rows: Mapping[Device, RowKey]) -> None:
    """Give the rows back, and wake who waits for what they held."""
    for device, row in rows.items():
        ledger = ledgers[device]
        try:
            wake(ledger, ledger.unregister(row))
        except LedgerError as error:
            logger.warning("kvcached: %s", error)  # its row is reaped when the process is gone
