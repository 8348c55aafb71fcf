"""Memory that models give from outside: all of it when told to, weights where others need room."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from parts.neighbour import Neighbour

from kvcached_core import control
from kvcached_core.control import Outcome
from kvcached_core.ledger.survey import open_ledgers
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import MIB

SLEEP_SECONDS = 20.0
PART = 4  # of a model's weights one part of so many has room


def fall_asleep(name: str, directory: Path) -> None:
    """Let an instance yield all of its weights, once its last request is over.

    Raises:
        RuntimeError: If it does not.
    """
    deadline = time.monotonic() + SLEEP_SECONDS
    while True:
        result = control.sleep(name, directory=directory, wait_seconds=10.0)
        if result.outcome is Outcome.APPLIED:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{name} did not yield its weights: {result}")
        time.sleep(0.01)


def rows(name: str, directory: Path) -> list[InstanceView]:
    """Return an instance's rows, one on each of its devices."""
    found = [row for device in control.devices(directory) for row in device.instances]
    return [row for row in found if row.name == name]


def are_offered(views: Iterable[InstanceView]) -> bool:
    """Return whether all of these could give their weights: host memory has a copy of each."""
    return all(
        view.weights_needed_bytes and view.weights_offered_bytes >= view.weights_bytes
        for view in views
    )


def wait_offered(look: Callable[[], Iterable[InstanceView]], seconds: float) -> float:
    """Wait until all have offered their weights.

    Args:
        look: Returns what the ledger says of them now.
        seconds: How long they have at most.

    Returns:
        How many seconds that took.

    Raises:
        RuntimeError: If one has not offered them by then.
    """
    begin = time.monotonic()
    while not are_offered(look()):
        if time.monotonic() > begin + seconds:
            raise RuntimeError(f"host copies of weights are not complete after {seconds:.0f} s")
        time.sleep(0.05)
    return time.monotonic() - begin


@contextmanager
def little_room(name: str, directory: Path, headroom_bytes: int) -> Iterator[None]:
    """Leave room for a part of a model's weights on each device: others give it the rest.

    What engines keep idle is room that nobody sees, so they give it back first.

    Args:
        name: The model; it has yielded, and those who are to give have their weights.
        directory: The folder of the ledgers.
        headroom_bytes: What engines leave of each device.
    """
    control.trim([], directory=directory)
    with open_ledgers(directory) as found, ExitStack() as stack:
        for ledger, view in found.views:
            needed_bytes = sum(
                row.weights_needed_bytes for row in view.instances if row.name == name
            )
            neighbour = Neighbour(ledger)
            stack.callback(neighbour.close)
            room_bytes = neighbour.room_bytes - headroom_bytes
            neighbour.take(max(room_bytes - needed_bytes // PART, 0), 2 * MIB)
        yield
