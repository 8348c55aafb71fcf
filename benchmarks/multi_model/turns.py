"""Gates at which models take turns on a device: some are awake, or one runs, at a time."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence


class TakingTurns:
    """So many models are awake at a time; the others' requests wait for their turn.

    A model that is awake keeps its turn while it has requests, until one of a model that sleeps has
    waited for `patience_seconds`; then the one that was asked longest ago lets no more of its own
    in, and sleeps when the last has ended. The model whose request has waited longest is woken, and
    all of its requests that have come by then are let in, however long others wait.

    Args:
        fall_asleep: Puts a model to sleep.
        wake_up: Wakes a model up.
        awake: The models that are awake at the start, and how many may be.
        patience_seconds: How long others wait for a model that always has something to do.

    Attributes:
        num_turns: How often a model was woken.
    """

    def __init__(
        self,
        fall_asleep: Callable[[int], Awaitable[None]],
        wake_up: Callable[[int], Awaitable[None]],
        *,
        awake: Sequence[int] = (0,),
        patience_seconds: float = 5.0,
    ) -> None:
        self._fall_asleep = fall_asleep
        self._wake_up = wake_up
        self._awake = list(awake)  # the one that was asked longest ago first
        self._patience_seconds = patience_seconds
        self._num_inside: Counter[int] = Counter()
        self._waiting: list[tuple[float, int]] = []
        self._is_turning = False
        self._turned_at: dict[int, float] = {}
        self._changed = asyncio.Condition()
        self.num_turns = 0

    async def enter(self, model: int) -> None:
        """See `Gate`."""
        ticket = (time.perf_counter(), model)
        async with self._changed:
            self._waiting.append(ticket)
            try:
                while not self._may_enter(*ticket):
                    before = None if self._is_turning else self._idle()
                    if before is not None and self._asleep():
                        await self._turn(before)
                    else:
                        await self._wait()
            finally:
                self._waiting.remove(ticket)
            self._num_inside[model] += 1
            self._awake.remove(model)
            self._awake.append(model)

    def leave(self, model: int) -> None:
        """See `Gate`."""
        self._num_inside[model] -= 1
        asyncio.get_running_loop().create_task(self._tell())

    def _may_enter(self, since: float, model: int) -> bool:
        if model not in self._awake:
            return False
        was_waited_for = since <= self._turned_at.get(model, 0.0)
        if was_waited_for or self._is_turning or model != self._awake[0]:
            return True
        first = min((begin for begin, _ in self._asleep()), default=math.inf)
        return time.perf_counter() - first <= self._patience_seconds

    def _asleep(self) -> list[tuple[float, int]]:
        """Return who waits for a model that sleeps."""
        return [ticket for ticket in self._waiting if ticket[1] not in self._awake]

    def _idle(self) -> int | None:
        """Return the model that may sleep: the one asked longest ago that has nothing to do."""
        busy = {model for model, num in self._num_inside.items() if num}
        busy |= {ticket[1] for ticket in self._waiting if self._may_enter(*ticket)}
        return next((model for model in self._awake if model not in busy), None)

    async def _turn(self, before: int) -> None:
        self._is_turning = True
        _, chosen = min(self._asleep())
        self._awake.remove(before)
        self._changed.release()
        try:
            await self._fall_asleep(before)
            await self._wake_up(chosen)
        finally:
            await self._changed.acquire()
            self._is_turning = False
        self._awake.append(chosen)
        self._turned_at[chosen] = time.perf_counter()
        self.num_turns += 1
        self._changed.notify_all()

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), self._patience_seconds)
        except TimeoutError:
            return

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class TurnedAwayError(ValueError):
    """A request that a model had no place for; the message says how many it takes."""


class FirstComeFirstServed:
    """One model runs at a time, and others are swapped in in the order of who waits longest.

    These are the rules of llama-swap's scheduler. A request to the model that runs is let in at
    once, whoever else waits. A request to another one waits until nothing is inside; then the model
    that has waited longest is swapped in, and all requests to it that have come by then are let in.
    A model takes so many requests at a time, and what comes beyond is turned away.

    Args:
        swap: Ends the model that runs, starts another, and returns when that one answers.
        running: The model that runs at the start.
        limit: How many requests a model takes at a time.

    Attributes:
        num_turns: How often a model was swapped in.
    """

    def __init__(
        self, swap: Callable[[int], Awaitable[None]], *, running: int = 0, limit: int = 10
    ) -> None:
        self._swap = swap
        self._running: int | None = running
        self._limit = limit
        self._num_inside = 0
        self._coming: int | None = None
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._swaps: set[asyncio.Task[None]] = set()
        self.num_turns = 0

    async def enter(self, model: int) -> None:
        """See `Gate`.

        Raises:
            TurnedAwayError: If the model has as many requests as it takes.
        """
        if self._coming is None and model == self._running:
            self._let_in(model)
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((model, place))
        self._look()
        await place

    def leave(self, model: int) -> None:
        """See `Gate`."""
        del model
        self._num_inside -= 1
        self._look()

    def _let_in(self, model: int) -> None:
        if self._num_inside >= self._limit:
            raise TurnedAwayError(f"model {model} takes {self._limit} requests at a time")
        self._num_inside += 1

    def _look(self) -> None:
        """Begin with the next swap, if there is one and it may begin."""
        if self._coming is None and not self._num_inside and self._waiting:
            self._coming = self._waiting[0][0]
            task = asyncio.get_running_loop().create_task(self._turn(self._coming))
            self._swaps.add(task)
            task.add_done_callback(self._swaps.discard)

    async def _turn(self, model: int) -> None:
        failure: Exception | None = None
        try:
            await self._swap(model)
        except Exception as error:  # noqa: BLE001  whatever it is, who waits has to know
            failure = error
        self.num_turns += 1
        self._running = None if failure else model
        self._coming = None
        own = [place for waiting, place in self._waiting if waiting == model]
        self._waiting = [entry for entry in self._waiting if entry[0] != model]
        for place in own:
            self._answer(place, model, failure)
        self._look()

    def _answer(self, place: "asyncio.Future[None]", model: int, failure: Exception | None) -> None:
        if place.done():  # who waited has gone
            return
        if failure is not None:
            place.set_exception(ValueError(f"model {model} did not start: {failure}"))
            return
        try:
            self._let_in(model)
        except TurnedAwayError as error:
            place.set_exception(error)
        else:
            place.set_result(None)
