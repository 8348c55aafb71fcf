"""The controller's end of a worker's connection: leases go out over it and end with it."""

import asyncio
import json
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from kvcached_gateway.errors import RefusedError
from kvcached_gateway.http.front import Front
from kvcached_gateway.http.worker_frames import (
    Answered,
    Cancelled,
    CancelTake,
    Close,
    Closed,
    Denied,
    End,
    FirstByte,
    FramesProtocol,
    FromWorker,
    Granted,
    Query,
    Refused,
    Reply,
    Rules,
    Take,
)
from kvcached_gateway.lease import Ending, Lease

__all__ = ["WorkerLeases", "rules_of"]


class _AllKeys(Protocol):
    """Keys that can be listed, as `keys.Keys` can."""

    @property
    def all(self) -> Sequence[Any]:
        """Each key, a pydantic model."""


def rules_of(front: Front) -> Rules:
    """Return what a worker goes by now: settings without environments, and keys by their hashes."""
    keys: Any = front.keys()
    return Rules(
        front.settings().model_dump_json(exclude={"environments"}).encode(),
        None if keys is None else _dumped(keys),
        front.is_ready(),
    )


def _dumped(keys: _AllKeys) -> bytes:
    return json.dumps([key.model_dump(mode="json") for key in keys.all]).encode()


class WorkerLeases(FramesProtocol):
    """Serves one worker. When the connection ends, whatever the worker held is given back.

    Args:
        front: What all workers share.
    """

    def __init__(self, front: Front) -> None:
        super().__init__(FromWorker)
        self._front = front
        self._leases: dict[int, Lease] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}  # of numbers that wait
        self._closing: dict[int, asyncio.Event] = {}  # set when the worker begins no answer
        self.has_ended = asyncio.Event()

    @property
    def num_leases(self) -> int:
        """How many leases the worker holds."""
        return len(self._leases)

    def came(self, message: FromWorker) -> None:
        """See `FramesProtocol`."""
        match message:
            case Take(number):
                self._tasks[number] = asyncio.create_task(self._take(message))
            case FirstByte(number):
                if lease := self._leases.get(number):
                    lease.first_byte()
            case End(number, ending, status):
                if lease := self._leases.pop(number, None):
                    lease.end(ending, status=status)
                self._has_closed(number)
            case Closed(number):
                self._has_closed(number)
            case CancelTake(number):
                self._forget(number)
            case Query(number):
                self._tasks[number] = asyncio.create_task(self._reply(message))
            case _:
                self._observe(message)

    def ended(self) -> None:
        """See `FramesProtocol`."""
        for number in [*self._tasks, *self._leases]:
            self._forget(number)
        self.has_ended.set()

    def _observe(self, message: FromWorker) -> None:
        observe = self._front.observe
        match message:
            case Answered(answer):
                observe.answered(answer)
            case Refused(model_id, code):
                observe.refused(model_id, code)
            case Cancelled(where):
                observe.cancelled(where)

    def _forget(self, number: int) -> None:
        """End what a number stands for, granted or not: the two may cross on their way."""
        if task := self._tasks.pop(number, None):
            task.cancel()
        if lease := self._leases.pop(number, None):
            lease.end(Ending.CANCELLED)
        self._has_closed(number)

    async def _close(self, number: int) -> None:
        """Tell the worker to begin no answer on a lease, and wait until it knows."""
        closed = self._closing.setdefault(number, asyncio.Event())
        self.send(Close(number))
        await closed.wait()

    def _has_closed(self, number: int) -> None:
        if closed := self._closing.pop(number, None):
            closed.set()

    async def _take(self, message: Take) -> None:
        number = message.number
        try:
            lease = await self._front.leases.take(message.ask)
        except RefusedError as error:
            self.send(
                Denied(number, error.status, error.code, error.message, error.retry_after_seconds)
            )
        else:
            self._leases[number] = lease
            lease.held_by(partial(self._close, number))
            self.send(
                Granted(number, lease.model_id, lease.address, lease.woken, lease.waited_seconds)
            )
        finally:
            self._tasks.pop(number, None)

    async def _reply(self, message: Query) -> None:
        try:
            if message.is_status:
                data = json.dumps(await self._front.status())
            else:
                data = await self._front.exposition()
            self.send(Reply(message.number, data.encode()))
        finally:
            self._tasks.pop(message.number, None)
