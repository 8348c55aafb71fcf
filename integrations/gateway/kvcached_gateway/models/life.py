"""What a model does, one thing after the other: start, serve, drain, end, fail, be tried again."""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from kvcached_gateway.errors import AdoptionError, EngineStartError
from kvcached_gateway.models.protocols import EngineRunner, RunningEngine, Subject
from kvcached_gateway.models.watch import Patience, hang
from kvcached_gateway.models.wishes import Begin, End
from kvcached_gateway.policy.demand import Mean
from kvcached_gateway.state import State

__all__ = ["Life"]

_log = logging.getLogger(__name__)


class Life:
    """The task of one model.

    Args:
        model: The model, which this alone changes, beside what leases do to it.
        runner: What starts its engine.
        patience: How long the engine is waited for.
    """

    def __init__(self, model: Subject, runner: EngineRunner, patience: Patience) -> None:
        self._model = model
        self._runner = runner
        self._patience = patience
        self._begin: Begin | None = None
        self._end: End | None = None
        self._news = asyncio.Event()
        self._rested = asyncio.Event()
        self._rested.set()
        self._num_failures = 0
        self._is_closed = False
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run())

    @property
    def is_wanted(self) -> bool:
        """Whether a start is wished for, and has not begun."""
        return self._begin is not None

    @property
    def is_told_to_end(self) -> bool:
        """Whether its end is wished for, and has not begun."""
        return self._end is not None

    def begin(self, wish: Begin) -> None:
        """Wish for an engine; where there is one, or one on its way, nothing happens."""
        if self._model.state in {State.COLD, State.FAILED} and self._begin is None:
            self._begin = wish
            self._tell()

    def end(self, wish: End) -> None:
        """Wish for its end; what is left of a wish for a start is forgotten."""
        self._begin = None
        if self._model.state is not State.COLD:
            self._end = wish
        self._tell()

    def has_served(self) -> None:
        """Say that its engine answered a request whole: it works."""
        self._num_failures = 0

    async def settled(self) -> None:
        """Wait until no wish is left, and its engine either serves or is gone."""
        await self._rested.wait()

    async def close(self, wish: End) -> None:
        """Carry out a last wish, and end the task."""
        self._is_closed = True
        self.end(wish)
        await self._task

    def _tell(self) -> None:
        self._rested.clear()
        self._news.set()

    async def _run(self) -> None:
        """Go on from one engine to the next; what nobody foresaw fails the model, not the task."""
        while True:
            begin = await self._next()
            if begin is None:
                return
            try:
                await self._live(begin)
            except Exception as error:  # noqa: BLE001  its task has to live as long as the model
                _log.exception("model %s", self._model.settings.id)
                self._model.lost()
                self._fail(f"{type(error).__name__}: {error}")

    async def _next(self) -> Begin | None:
        """Wait for a wish for an engine; return None when the task is to end."""
        while self._begin is None:
            if self._end is not None:
                self._end = None
                self._cool("it was told to stop")
            if self._is_closed:
                self._rested.set()
                return None
            self._rested.set()
            is_failed = self._model.state is State.FAILED
            seconds = self._model.next_try_at - self._loop.time() if is_failed else None
            self._news.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), seconds)
                continue
            self._cool("it may be tried again")
        begin, self._begin = self._begin, None
        return begin

    async def _live(self, begin: Begin) -> None:
        """Have an engine, from its start to its end."""
        model = self._model
        model.devices = begin.devices
        model.go(State.STARTING, begin.reason)
        engine = await self._start(begin)
        if engine is None:
            return
        self._news.clear()
        if self._end is None:
            self._rested.set()
        try:
            await self._serve(engine)
        except Exception:
            await engine.end(0.0)
            raise

    async def _serve(self, engine: RunningEngine) -> None:
        """Let an engine serve until it ends, hangs, or is told to end; then it is gone."""
        model = self._model
        is_there = True
        while is_there:
            watch = hang(
                engine, self._patience, lambda: model.waits_for_memory or not len(model.leases)
            )
            how = await self._first(watch, self._wished_end(), engine.ended())
            self._rested.clear()
            if how is None and self._end is not None:
                is_there = await self._stop(engine, self._end)
                continue
            is_there = False
            if how is not None:
                model.go(State.DRAINING, f"it hangs: {how}")
                await self._drain(engine, self._patience.hung_seconds)
                await model.leases.close()
                await self._bury(engine, f"it hung: {how}", is_hung=True)
            else:
                await self._bury(engine, "its engine ended by itself")

    async def _start(self, begin: Begin) -> RunningEngine | None:
        """Return the engine that is wished for; None where there will be none."""
        model, began = self._model, self._loop.time()
        if begin.record is not None:
            model.token, model.starts = begin.record.token, Mean(begin.record.start_seconds or None)
            model.num_starts = begin.record.num_starts
            work = self._runner.adopt(model.settings, begin.record)
        else:
            model.num_starts += 1
            work = self._runner.start(model.settings, begin.devices, model.token)
        task = asyncio.ensure_future(work)
        await self._first(asyncio.wait([task]), self._wished_end())
        if not task.done():
            task.cancel()
        try:
            engine = await task
        except asyncio.CancelledError:
            if not task.cancelled():
                raise  # this task itself is to end
            self._end = None
            self._cool("it was told to stop while it started")
        except AdoptionError as error:
            self._cool(str(error))
        except EngineStartError as error:
            if self._end is None:
                self._has_not_started(error, begin.reason)
            else:
                self._end = None
                self._cool("it was told to stop while it started")
        else:
            is_new = begin.record is None
            model.has(engine, self._loop.time() - began if is_new else None)
            return engine
        return None

    def _has_not_started(self, error: EngineStartError, reason: str) -> None:
        """Fail; but where memory was missing for the first time, whoever wants it may free some."""
        model = self._model
        model.token = ""  # the next answer is a new one: the files may have changed
        is_again, model.is_out_of_memory = model.is_out_of_memory, error.is_out_of_memory
        if not error.is_out_of_memory:
            self._fail(str(error))
        elif not is_again:
            self._cool(f"it found too little memory: {error}")
        else:
            self._fail(f"it found too little memory again ({reason}): {error}")

    async def _stop(self, engine: RunningEngine, wish: End) -> bool:
        """Drain and end an engine, or leave it; a later wish takes the place of this one.

        Returns:
            Whether it serves on: it was to end at once, and an answer had begun meanwhile.
        """
        model = self._model
        model.go(State.DRAINING, wish.reason)
        while self._end is not None:
            wish, self._end = self._end, None
            if not wish.is_at_once:
                await self._drain(engine, wish.drain_seconds)
                continue
            # Whoever has no answer yet is asked again; one that begins now would be cut off.
            has_begun = model.leases.have_begun or not await model.leases.close()
            if has_begun and self._end is None:
                self._stay()
                return True
        await model.leases.close()
        model.lost()
        if wish.is_kept:
            await engine.leave()
        else:
            # One that is told politely might answer those who are to be asked again.
            seconds = 0.0 if wish.is_at_once else self._patience.end_seconds
            await engine.end(seconds, is_hung=wish.is_at_once)
        self._cool(wish.reason)
        return False

    def _stay(self) -> None:
        """Serve on: it was told to end at once, and an answer had begun."""
        state = State.BUSY if len(self._model.leases) else State.WARM
        self._model.go(state, "an answer had begun before it could end at once")
        self._news.clear()
        self._rested.set()

    async def _drain(self, engine: RunningEngine, seconds: float | None) -> None:
        """Wait until all leases are back or the engine has ended, for some seconds at most.

        A wish that came meanwhile ends it, too.
        """
        waits = [self._model.leases.returned(), engine.ended(), self._wished_end()]
        if seconds is not None:
            waits.append(asyncio.sleep(seconds))
        await self._first(*waits)

    async def _bury(self, engine: RunningEngine, why: str, *, is_hung: bool = False) -> None:
        """End what is left of an engine that ended by itself, or hangs."""
        model = self._model
        model.lost()
        if model.state is not State.DRAINING:
            model.go(State.DRAINING, why)
        how = await engine.end(self._patience.abort_seconds if is_hung else 0.0, is_hung=is_hung)
        self._end = None
        why = f"{why}: {how}"
        if self._num_failures:
            self._fail(why)
        else:  # whoever was asked meanwhile starts it again, once
            self._num_failures = 1
            self._cool(why)

    def _fail(self, why: str) -> None:
        waits = self._patience.retry_seconds
        seconds = waits[min(self._num_failures, len(waits) - 1)]
        self._num_failures += 1
        self._model.failure = why
        self._model.next_try_at = self._loop.time() + seconds
        self._model.devices = ()
        self._model.go(State.FAILED, why)

    def _cool(self, why: str) -> None:
        if self._model.state is not State.COLD:
            self._model.devices = ()
            self._model.go(State.COLD, why)

    async def _wished_end(self) -> None:
        while self._end is None:
            self._news.clear()
            await self._news.wait()

    async def _first(self, *waits: Coroutine[Any, Any, Any]) -> Any:
        """Return what the first of some waits returned; the others are cancelled."""
        tasks = [asyncio.ensure_future(each) for each in waits]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next((task.result() for task in tasks if task in done), None)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
