"""What the schedulers of one server go by, so that all of them decide the same.

An engine has one scheduler, or one in each of its ranks. Fed the same requests, several of them
schedule the same as long as they are told the same. So there is one view of the ledgers and one
clock, those of rank 0, and every rank maps on its own device what rank 0 was promised on all.
"""

import time
from dataclasses import dataclass

from kvcached_core.engine.beside import RankBytes, Turn
from kvcached_core.engine.instance import Instance
from kvcached_core.engine.starting import Start
from kvcached_core.engine.telling import Gather, Share, alone, alone_of_all
from kvcached_core.engine.waiting import WaitingLog
from kvcached_core.ledger.shortage import PATIENCE_SECONDS
from kvcached_core.ledger.weights import WeightsWish
from kvcached_core.memory.devices import Device
from kvcached_core.memory.seats import Seat
from kvcached_core.weights.status import WeightStatus, merge

MICROSECONDS = 1_000_000

# How long what was seen in the ledgers holds, while nothing new is wanted of this server.
LOOK_SECONDS = 0.001
ON_RANK_0 = "see rank 0"  # which alone sees who holds what
# Several ranks that have nothing to do tell each other what is new once in so many turns.
NUM_IDLE_TURNS = 16


@dataclass(frozen=True)
class WantedPages:
    """What others, or the limit, want back.

    Attributes:
        asked_pages: Pages in all.
        owed_pages: The part for which requests have to stop if nothing else is left.
        wish: What somebody outside wants of the weights, a `WeightsWish`.
    """

    asked_pages: int
    owed_pages: int
    wish: int = 0


class Ranks:
    """The ledgers as every rank sees them. A `PageSource`.

    All ranks call what returns something in the same order: one asks, and tells the others. Where
    they are stages of a pipeline, it does not wait until they heard it. They may only call what
    waits for all ranks where no stage waits for another: at a start.

    Args:
        instance: The server in the ledgers; only rank 0 has it.
        seat: Where this rank reports what it maps.
        capacity_bytes: What instances may hold together on the device that has least.
        share: Returns rank 0's numbers on every rank.
        gather: Returns the numbers of all ranks on every rank, in the order of ranks.
        num_idle_turns: Several ranks that have nothing to do look once in so many turns.
    """

    def __init__(
        self,
        instance: Instance | None,
        seat: Seat,
        capacity_bytes: int,
        share: Share = alone,
        gather: Gather = alone_of_all,
        *,
        num_idle_turns: int = NUM_IDLE_TURNS,
    ) -> None:
        self.instance = instance
        self.seat = seat
        self.capacity_bytes = capacity_bytes
        self.room_pages = 0
        self._share = share
        self._gather = gather
        self.is_one_of_many = share is not alone  # of ranks that schedule alike
        self._turns_per_look = num_idle_turns
        self._microseconds = 0
        self._looked_at = 0.0
        self._num_idle_turns = 0
        self.is_waiting = False  # as far as the ledger was told
        self.refused_pages = 0  # what was wanted when there was less
        self._is_refused = False  # in this schedule
        self._log = WaitingLog(self.explain_shortage)

    @classmethod
    def alone(cls, instance: Instance, device: Device) -> "Ranks":
        """Return the view of an engine's only scheduler, whose first rank is on `device`."""
        return cls(instance, instance.seat(device), instance.capacity_bytes)

    def describe(
        self, *, page_bytes: int, num_pages: int, least_pages: int, token_bytes: int = 0
    ) -> None:
        """See `Instance.describe`."""
        if self.instance is not None:
            self.instance.describe(
                page_bytes=page_bytes,
                num_pages=num_pages,
                least_pages=least_pages,
                token_bytes=token_bytes,
            )

    def look(self, *, is_busy: bool = True, is_again: bool = False) -> WantedPages | None:
        """Look at the ledgers and the clock; return what is wanted back, or None for no news.

        An idle scheduler does this in every turn of its loop. It takes no lock unless somebody
        wants something, and ranks take turns together, so all leave out the same.

        Args:
            is_busy: Whether there are requests; the same on every rank.
            is_again: Return what is wanted even if it is nothing new; the same on every rank.
        """
        if is_busy or is_again:
            self._num_idle_turns = 0
        elif self.is_one_of_many:
            self._num_idle_turns += 1
            if self._num_idle_turns % self._turns_per_look:
                return None
        values = [0, 0, 0, self.room_pages, 0, 0]
        if self.instance is not None:
            now = time.monotonic()
            values[4] = int(now * MICROSECONDS)
            if self.instance.has_news() or is_again:
                values[:3] = [1, *self.instance.wanted_pages()]
                values[5] = self.instance.beside.wish()
            if values[0] or (is_busy and now >= self._looked_at + LOOK_SECONDS):
                self._looked_at = now
                values[3] = self.instance.room_pages()
        has_news, asked, owed, self.room_pages, self._microseconds, wish = self._share(values)
        return WantedPages(asked, owed, wish) if has_news else None

    def end_schedule(self, *, is_busy: bool) -> bool:
        """Take back that this server waits for memory, if nothing of it does any more.

        Args:
            is_busy: Whether requests wait; one that was refused may be among them.

        Returns:
            Whether it waits.
        """
        is_refused, self._is_refused = self._is_refused, False
        if self.is_waiting and not is_refused and not is_busy:
            self.clear_waiting()
        return self.is_waiting and is_busy

    def clear_waiting(self) -> None:
        """See `Instance.clear_waiting`."""
        self.is_waiting = False
        if self.instance is not None:
            self.instance.clear_waiting()

    def clock(self) -> float:
        """Return the seconds of rank 0's clock at the last look."""
        return self._microseconds / MICROSECONDS

    def promise(self, num_pages: int, *, is_urgent: bool, num_spare: int = 0) -> int:
        """See `PageSource.promise`."""
        granted = 0
        if self.instance is not None:
            granted = self.instance.promise(num_pages, is_urgent=is_urgent, num_spare=num_spare)
        (granted,) = self._share([granted])
        if is_urgent and num_pages:
            self.is_waiting = granted < num_pages
            if self.is_waiting:
                self._is_refused, self.refused_pages = True, num_pages
        self.room_pages = max(self.room_pages - granted, 0)
        return granted

    def ask(self, num_pages: int) -> None:
        """Ask for what there is no room for of so many pages; every rank waits then, whoever asked.

        See `Instance.ask`.
        """
        num_missing = num_pages - self.room_pages
        if num_missing > 0:
            self._is_refused = self.is_waiting = True
            self.refused_pages = num_pages
            if self.instance is not None:
                self.instance.ask(num_missing)

    def promise_first_page(self) -> str | None:
        """See `Instance.promise_first_page`."""
        shortage = None if self.instance is None else self.instance.promise_first_page()
        (is_short,) = self._share([int(shortage is not None)])
        return shortage or ON_RANK_0 if is_short else None

    def make_room(self, static_bytes: int, start: Start | None = None) -> str | None:
        """Announce what each rank is about to allocate beside its KV cache, and ask for it.

        Args:
            static_bytes: What this rank is; the largest of all ranks counts for each.
            start: What is known of an engine that starts; None for one that wakes.

        Returns:
            None if there is room: call `announce(0)` when it is allocated. Otherwise what is
            missing and who holds it, as rank 0 found it.
        """
        needed_bytes = max(needed for (needed,) in self._gather([static_bytes]))
        shortage = None
        if needed_bytes and self.instance is not None:
            if start is not None:
                shortage = self.instance.make_room_to_start(needed_bytes, start)
            else:
                shortage = self.instance.beside.make_room(needed_bytes, PATIENCE_SECONDS)
        (is_short,) = self._share([int(shortage is not None)])
        return (str(shortage) if shortage is not None else ON_RANK_0) if is_short else None

    def announce(self, static_bytes: int) -> None:
        """See `Beside.announce`; all ranks come here first, with the rest of it allocated."""
        self._gather([static_bytes])
        if self.instance is not None:
            self.instance.beside.announce(static_bytes)

    def most(self, values: list[int]) -> list[int]:
        """Return the largest of each of these numbers that a rank has."""
        return [max(each) for each in zip(*self._gather(values), strict=True)]

    def add_up(self, values: list[int]) -> list[int]:
        """Return the sum of each of these numbers over all ranks."""
        return [sum(each) for each in zip(*self._gather(values), strict=True)]

    def merge(self, status: WeightStatus | None) -> WeightStatus | None:
        """Return what holds for the weights of all ranks; None if one of them keeps its own."""
        if not self.is_one_of_many:
            return status
        found = status or WeightStatus(0, 0, 0, is_copied=False)
        told = self._gather(
            [found.num_pages, found.num_resident_pages, found.page_bytes, found.is_copied]
        )
        statuses = [WeightStatus(one[0], one[1], one[2], is_copied=bool(one[3])) for one in told]
        return merge(statuses) if all(one.num_pages for one in statuses) else None

    def describe_weights(self, needed_bytes: RankBytes) -> None:
        """See `Beside.describe_weights`."""
        if self.instance is not None:
            self.instance.beside.describe_weights(needed_bytes)

    def offer_weights(self, offered_bytes: RankBytes, *, is_kept: bool) -> None:
        """See `Beside.offer_weights`."""
        if self.instance is not None:
            self.instance.beside.offer_weights(offered_bytes, is_kept=is_kept)

    def ask_to_wake(self, missing_bytes: RankBytes) -> Turn:
        """See `Beside.ask_to_wake`."""
        turn = Turn.LATER
        if self.instance is not None:
            turn = self.instance.beside.ask_to_wake(missing_bytes)
            if turn is not Turn.NOW:
                self._log.refused()
        return Turn(self._share([turn])[0])

    def woke(self, waited_ns: int, took_ns: int) -> None:
        """See `Beside.woke`."""
        if self.instance is not None:
            self.instance.beside.woke(waited_ns, took_ns)

    def stop_waking(self) -> None:
        """See `Beside.stop_waking`."""
        self._log.over()
        if self.instance is not None:
            self.instance.beside.stop_waking()

    def explain_shortage(self) -> str:
        """See `Beside.explain_shortage`."""
        if self.instance is None:
            return ON_RANK_0
        return self.instance.beside.explain_shortage()

    def end_wish(self, wish: int) -> None:
        """See `Beside.end_wish`."""
        if self.instance is not None:
            self.instance.beside.end_wish(WeightsWish(wish))

    def is_over(self, deadline: float) -> bool:
        """Return whether a time of rank 0's `time.monotonic` is over."""
        return bool(self._share([time.monotonic() > deadline])[0])

    def cancel(self, num_pages: int) -> None:
        """See `PageSource.cancel`."""
        self.room_pages += num_pages
        if self.instance is not None:
            self.instance.cancel(num_pages)

    def acknowledge(self, num_pages: int, *, is_last: bool = True) -> None:
        """See `Instance.acknowledge`; no rank goes on to unmap before the first one has done it."""
        if self.instance is not None:
            self.instance.acknowledge(num_pages, is_last=is_last)
        self._share([num_pages])

    def set_alarm(self, seconds: float) -> None:
        """See `Instance.set_alarm`."""
        if self.instance is not None:
            self.instance.set_alarm(seconds)

    def close(self) -> None:
        """Leave the ledgers."""
        if self.instance is not None:
            self.instance.close()
