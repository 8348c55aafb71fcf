"""The worker's end of its connection: what the HTTP front needs, asked of the controller."""

import asyncio
import itertools
import json
from typing import Any

from kvcached_gateway.errors import RefusedError, draining
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
    FromController,
    Granted,
    Query,
    Refused,
    Reply,
    Rules,
    Take,
)
from kvcached_gateway.lease import Address, Ask, Ending, HowToClose, Lease, Woken
from kvcached_gateway.observe import Answer, Where
from kvcached_gateway.settings.config import Settings
from kvcached_gateway.settings.keys import Key, Keys

__all__ = ["WorkerLink", "read_keys"]


class WorkerLink(FramesProtocol):
    """Leases, settings, keys, status and an observer, all of them the controller's.

    Attributes:
        rules_came: Set once the controller said what holds.
        has_ended: Set when the controller is gone; nothing can be served any more.
    """

    def __init__(self) -> None:
        super().__init__(FromController)
        self.rules_came = asyncio.Event()
        self.has_ended = asyncio.Event()
        self._settings: Settings | None = None
        self._keys: Keys | None = None
        self._is_ready = False
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._held: dict[int, _RemoteLease] = {}

    @property
    def settings(self) -> Settings:
        """The settings that hold now; there are none before `rules_came`."""
        if self._settings is None:
            raise RuntimeError("no rules have come yet")
        return self._settings

    def front(self) -> Front:
        """Return what an HTTP front needs."""
        return Front(
            leases=self,
            settings=lambda: self.settings,
            keys=lambda: self._keys,
            status=self._status,
            exposition=self._exposition,
            observe=self,
            is_ready=lambda: self._is_ready,
        )

    def came(self, message: FromController) -> None:
        """See `FramesProtocol`."""
        match message:
            case Rules(settings, keys, is_ready):
                self._settings = Settings.model_validate_json(settings)
                self._keys = None if keys is None else read_keys(keys)
                self._is_ready = is_ready
                self.rules_came.set()
            case Granted(number):
                lease = _RemoteLease(self, message)
                if self._settle(number, lease):
                    self._held[number] = lease
            case Close(number):
                if held := self._held.get(number):
                    held.close()
                self.send(Closed(number))
            case Denied(number, status, code, text, retry):
                error = RefusedError(status, code, text, retry_after_seconds=retry)
                self._settle(number, error)
            case Reply(number, data):
                self._settle(number, data)

    def ended(self) -> None:
        """See `FramesProtocol`."""
        self._is_ready = False
        self.has_ended.set()
        for number in list(self._waiting):
            self._settle(number, draining())

    async def take(self, ask: Ask) -> Lease:
        """See `lease.Leases`."""
        if self.has_ended.is_set():
            raise draining()
        number = next(self._numbers)
        self.send(Take(number, ask))
        try:
            lease: Lease = await self._answer(number)
        except asyncio.CancelledError:
            self.gave_back(number)
            self.send(CancelTake(number))
            raise
        return lease

    def gave_back(self, number: int) -> None:
        """Hold a lease no more."""
        self._held.pop(number, None)

    def answered(self, answer: Answer) -> None:
        """See `observe.Observer`."""
        self.send(Answered(answer))

    def refused(self, model_id: str | None, code: str) -> None:
        """See `observe.Observer`."""
        self.send(Refused(model_id, code))

    def cancelled(self, where: Where) -> None:
        """See `observe.Observer`."""
        self.send(Cancelled(where))

    async def _status(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(await self._query(is_status=True))
        return rows

    async def _exposition(self) -> str:
        return (await self._query(is_status=False)).decode()

    async def _query(self, *, is_status: bool) -> bytes:
        if self.has_ended.is_set():
            raise draining()
        number = next(self._numbers)
        self.send(Query(number, is_status))
        data: bytes = await self._answer(number)
        return data

    async def _answer(self, number: int) -> Any:
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            return await waiting
        finally:
            del self._waiting[number]

    def _settle(self, number: int, found: Any) -> bool:
        """Hand on what was asked for, and say whether anybody still waits for it."""
        waiting = self._waiting.get(number)
        if waiting is None or waiting.done():
            return False  # its client left: a lease was given back by `CancelTake`
        if isinstance(found, RefusedError):
            waiting.set_exception(found)
        else:
            waiting.set_result(found)
        return True


class _RemoteLease:
    """A lease that is held here and counted there."""

    def __init__(self, link: WorkerLink, granted: Granted) -> None:
        self._link = link
        self._number = granted.number
        self._has_begun = self._has_ended = self._is_closed = False
        self.model_id: str = granted.model_id
        self.address: Address = granted.address
        self.woken: Woken = granted.woken
        self.waited_seconds: float = granted.waited_seconds

    def first_byte(self) -> bool:
        if self._is_closed:
            return False
        self._has_begun = True
        self._link.send(FirstByte(self._number))
        return True

    def close(self) -> None:
        """Begin no answer any more; one that has begun goes on."""
        self._is_closed = not self._has_begun

    def held_by(self, close: HowToClose) -> None:
        """Nobody but this process passes its answer on."""

    def end(self, ending: Ending, *, status: int = 0) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._link.gave_back(self._number)
            self._link.send(End(self._number, ending, status))


def read_keys(data: bytes) -> Keys:
    """Return the keys of `worker_leases.rules_of`."""
    return Keys(tuple(Key.model_validate(row) for row in json.loads(data)))
