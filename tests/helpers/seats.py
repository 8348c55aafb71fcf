"""What the ledger of a device says of an instance in this process."""

from pathlib import Path

from kvcached_core.engine.instance import Instance
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import InstanceView
from kvcached_core.memory.devices import Device


def view_of(instance: Instance, device: Device) -> InstanceView:
    """Return the instance's row on a device."""
    seat = instance.seat(device)
    with Ledger(Path(seat.ledger_path)) as ledger:
        return next(view for view in ledger.view().instances if view.row == seat.row)
