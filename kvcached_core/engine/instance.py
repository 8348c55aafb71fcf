"""One engine in the ledgers of all its devices: what it is promised, it is promised on all."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil
from typing import TYPE_CHECKING

from kvcached_core.config import Config
from kvcached_core.engine.beside import Beside
from kvcached_core.engine.names import numbered_names, rank_name
from kvcached_core.engine.starting import Start, StartLog, make_room_to_start, open_with_room
from kvcached_core.engine.waiting import Refusals, explain_waits
from kvcached_core.ledger.bell import Doorbell, wake
from kvcached_core.ledger.changes import NO_ASK
from kvcached_core.ledger.expected import Patience
from kvcached_core.ledger.opening import doorbell_path
from kvcached_core.ledger.shortage import (
    LOOK_SECONDS,
    PATIENCE_SECONDS,
    Shortage,
    ask_peers,
    explain,
    short_of,
)
from kvcached_core.memory.devices import Device
from kvcached_core.memory.seats import Seat, close_ledgers, leave_rows, take_rows

if TYPE_CHECKING:
    from kvcached_core.ledger.file import RowKey
    from kvcached_core.ledger.ledger import Ledger


class Instance:
    """The rows of one engine, one for each device that its ranks use.

    The scheduler's thread calls it. In a child that the process forks it is nobody's: there closing
    it does nothing, and everything else is refused.

    Attributes:
        beside: What it allocates beside its KV cache, and its weights.

    Args:
        devices: The device of each rank.
        config: The settings; they name the folder and the limit.
        name: The instance's name, if it is not the one in the settings.
        default_name: What it is called without either, with a number behind it if need be.
        engine: The engine and its release.
        data_rank: Its number among ranks of one server that share no requests, from 0 on.
        on_ring: Called in a thread of ours when somebody rings or an alarm goes off.

    Raises:
        LedgerError: If a ledger cannot be used, or the name is taken.
        ConfigError: If a size is above what the device has.
        PolicyError: If limit, floor or priority cannot be promised.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        config: Config,
        *,
        name: str | None = None,
        default_name: str,
        engine: str,
        data_rank: int = 0,
        on_ring: Callable[[], None] = lambda: None,
    ) -> None:
        self.page_bytes = 0
        self._num_ranks = Counter(devices)
        self._ledgers: dict[Device, Ledger] = {}
        self._rows: dict[Device, RowKey] = {}
        self._bells: list[Doorbell] = []
        self._seen: dict[Device, int] = {}
        self._num_asked: dict[Device, int] = {}
        self._tell = on_ring
        self._rang = threading.Event()
        self._pid = os.getpid()
        self._refusals = Refusals(lambda: explain_waits(self._ledgers, self._rows))
        try:
            self._ledgers = open_with_room(self._num_ranks, config)
            name = name or config.name
            own_name = rank_name(name or default_name, data_rank)
            names = [own_name] if name else numbered_names(own_name)
            self._rows = take_rows(self._ledgers, names, engine=engine, config=config)
            self.beside = Beside(
                self._ledgers,
                self._rows,
                devices,
                self._rang,
                config.weights_kept_seconds,
            )
            for device, ledger in self._ledgers.items():
                path = doorbell_path(ledger.path, self._rows[device])
                self._bells.append(Doorbell(path, self._on_ring))
        except BaseException:
            self.close()
            raise

    @property
    def capacity_bytes(self) -> int:
        """What instances may hold together on the device that has least, in bytes."""
        return min(ledger.capacity_bytes for ledger in self._ledgers.values())

    @property
    def name(self) -> str:
        """What it is called in the ledgers."""
        device, row = next(iter(self._rows.items()))
        return next(one.name for one in self._ledgers[device].view().instances if one.row == row)

    def seat(self, device: Device) -> Seat:
        """Return where a rank on `device` reports what it maps."""
        ledger = self._ledgers[device]
        return Seat(str(ledger.path), self._rows[device], self._num_ranks[device])

    def describe(
        self, *, page_bytes: int, num_pages: int, least_pages: int = 0, token_bytes: int = 0
    ) -> None:
        """Say how large a page is on each rank, in bytes, and how many there are.

        Args:
            page_bytes: Bytes of a page.
            num_pages: Pages of the pool.
            least_pages: Pages that the largest request needs: no limit may be below them, and the
                floors of others have to leave them.
            token_bytes: What the KV of one token takes on each rank; 0 where nobody knows.

        Raises:
            PolicyError: If these floors do not.
        """
        self.page_bytes = page_bytes
        for device, ledger in self._ledgers.items():
            unit_bytes = self._unit_bytes(device)
            ledger.describe(
                self._rows[device],
                page_bytes=unit_bytes,
                virtual_bytes=num_pages * unit_bytes,
                least_bytes=least_pages * unit_bytes,
                token_bytes=token_bytes * self._num_ranks[device],
            )

    def promise(self, num_pages: int, *, is_urgent: bool, num_spare: int = 0) -> int:
        """Promise up to `num_pages` pages on every rank; if it is urgent, ask others for the rest.

        Args:
            num_pages: Pages that are wanted.
            is_urgent: Whether a request has to wait without them.
            num_spare: Pages that are welcome beyond them; nobody is asked for these, and who waits
                comes first, its own requests too.

        Returns:
            How many pages were promised, the same on all devices.
        """
        if self._refusals.is_refused(num_pages):
            return 0
        granted = self._promise_on_all(num_pages, num_spare, may_borrow=is_urgent)
        if is_urgent and num_pages:
            if granted < num_pages:
                self._refusals.refuse(num_pages - granted)
                self._ask_peers(num_pages - granted)
            else:
                self._refusals.end()
        return granted

    def _promise_on_all(self, num_pages: int, num_spare: int, *, may_borrow: bool) -> int:
        granted = num_pages + num_spare
        taken: list[tuple[Device, int]] = []
        for device, ledger in self._ledgers.items():
            unit_bytes = self._unit_bytes(device)
            needed = min(num_pages, granted)
            promised = ledger.promise(
                self._rows[device],
                needed * unit_bytes,
                unit_bytes,
                spare_bytes=(granted - needed) * unit_bytes,
                is_waiting=may_borrow,
            )
            granted = promised // unit_bytes
            taken.append((device, granted))
        for device, num_taken in taken:
            if num_taken > granted:
                self._cancel_on(device, num_taken - granted)
        return granted

    def ask(self, num_pages: int) -> None:
        """Ask others for what a request waits for, unless they were just asked; promise nothing."""
        if self._refusals.may_ask():
            self._ask_peers(num_pages)

    def promise_first_page(self) -> str | None:
        """Have one page promised; wait for neighbours as long as a start may.

        It never comes back, so it is not borrowed from a floor.

        Returns:
            None if it was promised, or what is missing, and who holds it.
        """
        patience, log = Patience(PATIENCE_SECONDS, has_loaded=True), StartLog()
        while not self._promise_on_all(1, 0, may_borrow=False):
            self._ask_peers(1)
            short = short_of(self.beside.needs_of(self.page_bytes))
            if patience.is_over((need.ledger.view(), need.row) for need in short):
                return explain(short)
            log.waits(short, patience.waits_for)
            self._rang.wait(LOOK_SECONDS)
            self._rang.clear()
        return None

    def make_room_to_start(self, static_bytes: int, start: Start) -> Shortage | None:
        """Wait for room for what each rank allocates first; see `make_room_to_start`."""
        needs, patience = self.beside.needs_of(static_bytes), Patience(PATIENCE_SECONDS)
        return make_room_to_start(needs, self._rang, start, patience)

    def announce(self, static_bytes: int) -> None:
        """See `Beside.announce`."""
        self.beside.announce(static_bytes)

    def clear_waiting(self) -> None:
        """Say that nothing of this instance waits for memory any more, on any device."""
        self._refusals.end()
        for device, ledger in self._ledgers.items():
            ledger.clear_waiting(self._rows[device])

    def cancel(self, num_pages: int) -> None:
        """Take back a promise of `num_pages` pages on every rank."""
        for device in self._ledgers:
            self._cancel_on(device, num_pages)

    def has_news(self) -> bool:
        """Return whether somebody wants something new of this instance. Takes no lock."""
        has_news = False
        for device, ledger in self._ledgers.items():
            num_notices = ledger.num_notices(self._rows[device])
            if num_notices != self._seen.get(device) or num_notices < 0:
                self._seen[device] = num_notices
                has_news = True
        return has_news

    def wanted_pages(self) -> tuple[int, int]:
        """Return how many pages others, or the limit, want back from this instance.

        The second number is the part for which requests have to stop if nothing else is left.
        """
        found = []
        for device, ledger in self._ledgers.items():
            wanted = ledger.wanted(self._rows[device])
            self._num_asked[device] = wanted.num_asked
            found.append((wanted, self._unit_bytes(device)))
        asked = max(ceil(wanted.asked_bytes / unit_bytes) for wanted, unit_bytes in found)
        return asked, max(ceil(wanted.owed_bytes / unit_bytes) for wanted, unit_bytes in found)

    def acknowledge(self, num_pages: int, *, is_last: bool = True) -> None:
        """Say that this instance gives what it can, and that `num_pages` are about to be unmapped.

        It comes before the orders to unmap them, which take from what is announced here. Until the
        last of several parts the rest stays asked for.
        """
        for device, ledger in self._ledgers.items():
            coming_bytes = num_pages * self._unit_bytes(device)
            asked = self._num_asked.get(device) if is_last else NO_ASK
            ledger.acknowledge(self._rows[device], coming_bytes, num_asked=asked)

    def set_alarm(self, seconds: float) -> None:
        """Call `on_ring` once in `seconds`; an alarm that is set already is replaced."""
        self._bells[0].set_alarm(seconds)

    def room_pages(self) -> int:
        """Return how many pages would be promised now; nothing is promised."""
        return min(
            ledger.room_bytes(self._rows[device]) // self._unit_bytes(device)
            for device, ledger in self._ledgers.items()
        )

    def close(self) -> None:
        """Leave the ledgers."""
        if os.getpid() != self._pid:
            return
        for bell in self._bells:
            bell.close()
        self._bells = []
        leave_rows(self._ledgers, self._rows)
        close_ledgers(self._ledgers)
        self._rows, self._ledgers = {}, {}

    def _on_ring(self) -> None:
        self._refusals.forget()
        self._rang.set()
        self._tell()

    def _unit_bytes(self, device: Device) -> int:
        return self.page_bytes * self._num_ranks[device]

    def _cancel_on(self, device: Device, num_pages: int) -> None:
        ledger = self._ledgers[device]
        wake(ledger, ledger.cancel(self._rows[device], num_pages * self._unit_bytes(device)))

    def _ask_peers(self, num_pages: int) -> None:
        for device, ledger in self._ledgers.items():
            ask_peers(ledger, self._rows[device], num_pages * self._unit_bytes(device))
