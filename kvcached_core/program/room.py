"""A program in the ledgers of its devices: room found, kept while it runs, and given back."""

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from kvcached_core.config import Config
from kvcached_core.engine.beside import can_come
from kvcached_core.engine.names import numbered_names
from kvcached_core.engine.starting import Start, StartLine, StartLog
from kvcached_core.errors import LedgerError, NameTakenError, NoRoomError
from kvcached_core.ledger.bell import Doorbell, wake
from kvcached_core.ledger.expected import Expected, expected, own_of
from kvcached_core.ledger.file import PROGRAM, RowKey
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import doorbell_path
from kvcached_core.ledger.policy import Policy, shares
from kvcached_core.ledger.shortage import LOOK_SECONDS, Need, ask_peers, short_of
from kvcached_core.memory.devices import Device
from kvcached_core.memory.seats import close_ledgers, leave_rows, take_under_one_name
from kvcached_core.program.claim import Claim, move
from kvcached_core.program.held import Held, held_reader
from kvcached_core.units import format_bytes, parse_bytes

NEED = "--need"


class Place:
    """A program's row on one device.

    Attributes:
        device: The device.
        ledger: Its ledger.
        row: The row.
        claim: What the program has of what it needs.
    """

    def __init__(self, device: Device, ledger: Ledger, row: RowKey, needed_bytes: int) -> None:
        self.device, self.ledger, self.row = device, ledger, row
        self.claim = Claim(needed_bytes)
        self._held: Held | None = None

    @property
    def need(self) -> Need:
        """What it needs, as those say it that start."""
        return Need(self.ledger, self.row, self.claim.needed_bytes)

    def begin(self) -> None:
        """Note what is in use of the device before the program runs."""
        self._held = held_reader(self.device, self.row, self.claim.needed_bytes, self.ledger.view)

    def look(self, pids: Sequence[int]) -> None:
        """Write into the row what the program holds; have neighbours give what is its own still.

        What it frees may be promised to others before the row says that the program may have it
        again. Then they are asked for it.
        """
        held = self._held
        found = Claim(self.claim.needed_bytes, held(pids) if held else 0)
        if found != self.claim:
            change = move(self.claim, found)
            self.claim = found
            woken = self.ledger.settle_program(
                self.row,
                mapped_bytes=change.mapped_bytes,
                unmapped_bytes=change.unmapped_bytes,
                announced_bytes=change.announced_bytes,
            )
            wake(self.ledger, woken)
        missing = found.announced_bytes and found.announced_bytes - self.ledger.free_bytes(self.row)
        if missing > 0:
            ask_peers(self.ledger, self.row, missing, is_static=True)


class Room:
    """The room of one program, on all of its devices; gone behind its block.

    Args:
        devices: The devices.
        config: The settings; they name the folder.
        name: What it is called; a number comes behind it where that is taken.
        need: What it needs of each device, as people write it.
        priority: Weights that were just had back go for a higher one only.

    Raises:
        ConfigError: If the need is no size.
        LedgerError: If a ledger cannot be used.
        NoRoomError: If a device does not have as much as it needs.
    """

    def __init__(
        self, devices: Sequence[Device], config: Config, *, name: str, need: str, priority: int
    ) -> None:
        self.places: list[Place] = []
        self._config, self._policy = config, Policy(priority=priority)
        self._rang = threading.Event()
        self._bells: list[Doorbell] = []
        self._ledgers: dict[Device, Ledger] = {}
        try:
            # All who are on several devices take them in one order.
            for device in sorted(devices, key=lambda device: device.name):
                self._ledgers[device] = device.join_ledger(config)
            sizes = [_size(need, ledger) for ledger in self._ledgers.values()]
            self.name = self._take(name, sizes)
            for place in self.places:
                path = doorbell_path(place.ledger.path, place.row)
                self._bells.append(Doorbell(path, self._rang.set))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def make(self, seconds: float, is_stopped: Callable[[], bool] = lambda: False) -> bool:
        """Have neighbours give what is missing; return False if it was stopped before.

        They give idle pages, cached blocks and weights that they offer, and what requests use when
        these end. It stands in the line of those that start and wake, and announces nothing while
        even that is not enough. Afterwards it is announced.

        Args:
            seconds: How long it waits at most.
            is_stopped: Whether to wait no longer.

        Raises:
            NoRoomError: With what is missing, and who holds it.
        """
        needs = [place.need for place in self.places]
        start, log = Start(self._config.page_bytes, may_yield=False), StartLog()
        # Requests end, and what they hold is the program's then: it waits for that, as a wake does.
        line = StartLine(needs, start, can_come)
        deadline = time.monotonic() + seconds
        try:
            while True:
                self._rang.clear()
                if line.look():
                    return True
                if is_stopped():
                    return False
                left_seconds = deadline - time.monotonic()
                if left_seconds <= 0:
                    raise NoRoomError(self._explain(short_of(needs)))
                log.waits(short_of(needs), _coming(needs))
                self._rang.wait(min(LOOK_SECONDS, left_seconds))
        finally:
            for need in needs:
                need.ledger.clear_waiting(need.row)

    def begin(self) -> None:
        """Note what is in use before the program runs."""
        for place in self.places:
            place.begin()

    def look(self, pids: Sequence[int]) -> None:
        """Write into the rows what the program's processes hold."""
        for place in self.places:
            place.look(pids)

    def close(self) -> None:
        """Give the room back."""
        for bell in self._bells:
            bell.close()
        leave_rows(self._ledgers, {place.device: place.row for place in self.places})
        close_ledgers(self._ledgers)
        self.places, self._bells, self._ledgers = [], [], {}

    def _take(self, name: str, sizes: Sequence[int]) -> str:
        def register(_device: Device, ledger: Ledger, numbered: str) -> RowKey:
            return ledger.register(name=numbered, engine=PROGRAM, policy=self._policy)

        try:
            found, rows = take_under_one_name(self._ledgers, numbered_names(name), register)
        except NameTakenError as error:
            raise LedgerError(
                f"too many programs named {name!r} run at the same time; use --name"
            ) from error
        for (device, row), size in zip(rows.items(), sizes, strict=True):
            self.places.append(Place(device, self._ledgers[device], row, size))
        return found

    def _explain(self, short: Sequence[Need]) -> str:
        missing = "; ".join(_of_device(need) for need in short)
        return (
            f"there is no room for {self.name}: {missing}; lower {NEED}, wait for longer with "
            "--wait, or stop who holds it"
        )


def _size(text: str, ledger: Ledger) -> int:
    capacity = ledger.capacity_bytes
    size = parse_bytes(text, what=NEED, whole_bytes=capacity)
    if not 0 < size <= capacity:
        raise NoRoomError(
            f"{NEED}={text!r} is not allowed on {ledger.device}; all instances share "
            f"{format_bytes(capacity)} there: use more than 0, and no more than that"
        )
    return size


def _coming(needs: Sequence[Need]) -> list[Expected]:
    """Return the weights that neighbours will offer, but not yet."""
    views = [(need.ledger.view(), need.row) for need in needs]
    now_ns = time.time_ns()
    return [one for view, row in views for one in expected(view, own_of(view, row), now_ns)]


def _of_device(need: Need) -> str:
    """Say what is missing, who holds it, what is kept for floors, and what could be had."""
    view = need.ledger.view()
    own = own_of(view, need.row)
    peers = [one for one in view.instances if one is not own]
    given = sum(peer.coming_bytes for peer in peers)
    if own is not None:
        found = shares(
            own,
            peers,
            view.capacity_bytes,
            is_waiting=False,
            is_static=True,
            now_ns=time.time_ns(),
        )
        given += sum(share.give_bytes for share in found)
    most = max(need.ledger.free_bytes(need.row) + given, 0)
    floors = [f"{one.name} {format_bytes(one.floor_bytes)}" for one in peers if one.floor_bytes]
    kept = f", with floors kept for {', '.join(floors)}" if floors else ""
    return f"{need.shortage()}{kept}; {format_bytes(most)} could be had now"
