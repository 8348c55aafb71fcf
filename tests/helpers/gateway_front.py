"""The gateway's HTTP front on a real server, without engines: who leases is told what to do."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from kvcached_gateway.errors import RefusedError
from kvcached_gateway.http.app import build_app, build_runner
from kvcached_gateway.http.front import Front
from kvcached_gateway.lease import Address, Ask, Ending, HowToClose, Lease, Woken
from kvcached_gateway.observe import Answer
from kvcached_gateway.settings.config import ModelSettings, ServiceClass, Settings


def make_settings(**values: Any) -> Settings:
    """Return settings with the models `tiny` (also called `gpt`) and `slow`, and a class."""
    defaults: dict[str, Any] = {
        "path": Path("models.yaml"),
        "models": {
            "tiny": ModelSettings(id="tiny", url="http://127.0.0.1:1", aliases=("gpt",)),
            "slow": ModelSettings(id="slow", url="http://127.0.0.1:1", loading="comments"),
        },
        "classes": {"chat": ServiceClass(name="chat")},
    }
    return Settings(**defaults | values)


class RefusingLeases:
    """Grants nothing: what the front refuses never comes here, the rest is written down."""

    def __init__(self) -> None:
        self.asks: list[Ask] = []
        self.error = RefusedError(503, "model_loading", "it loads", retry_after_seconds=6.2)

    async def take(self, ask: Ask) -> Lease:
        self.asks.append(ask)
        raise self.error


class PatientLeases:
    """Lets every request wait until `answer` says something."""

    def __init__(self) -> None:
        self.came = asyncio.Event()
        self.left = asyncio.Event()
        self.answer: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()

    async def take(self, ask: Ask) -> Lease:
        self.came.set()
        try:
            return await asyncio.shield(self.answer)
        except asyncio.CancelledError:
            self.left.set()
            raise


@dataclass
class GivenLease:
    """A lease to an address, which writes down what becomes of it."""

    address: Address
    model_id: str = "tiny"
    woken: Woken = Woken.NONE
    waited_seconds: float = 0.0
    endings: list[tuple[Ending, int]] = field(default_factory=list)
    num_first_bytes: int = 0
    is_closed: bool = False
    close: HowToClose | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def first_byte(self) -> bool:
        self.num_first_bytes += not self.is_closed
        return not self.is_closed

    def held_by(self, close: HowToClose) -> None:
        self.close = close

    def end(self, ending: Ending, *, status: int = 0) -> None:
        if not self.endings:
            self.endings.append((ending, status))
        self.ended.set()


class GivenLeases:
    """Hands out the addresses of engines that run, in turn; the last one for ever."""

    def __init__(self, *addresses: Address) -> None:
        self._addresses = addresses
        self.asks: list[Ask] = []
        self.leases: list[GivenLease] = []

    async def take(self, ask: Ask) -> Lease:
        self.asks.append(ask)
        address = self._addresses[min(len(self.leases), len(self._addresses) - 1)]
        self.leases.append(GivenLease(address))
        return self.leases[-1]


class Written:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.answers: list[Answer] = []
        self.cancelled_one = asyncio.Event()

    def answered(self, answer: Answer) -> None:
        self.told.append(("answered", answer.model_id, answer.class_name, answer.status))
        self.answers.append(answer)

    def refused(self, model_id: str | None, code: str) -> None:
        self.told.append(("refused", model_id, code))

    def cancelled(self, where: str) -> None:
        self.told.append(("cancelled", where))
        self.cancelled_one.set()


@dataclass(frozen=True)
class FakeKey:
    name: str
    models: Sequence[str] | None = None
    class_name: str | None = None
    max_concurrent: int | None = None
    requests_per_minute: float | None = None
    may_set_deadline: bool = False


class FakeKeys:
    """Keys by what they are written as."""

    def __init__(self, **keys: FakeKey) -> None:
        self._keys = keys

    def find(self, authorization: str | None) -> FakeKey | None:
        return self._keys.get((authorization or "").removeprefix("Bearer "))


@dataclass
class House:
    """A front that is served.

    Attributes:
        port: Its port on the loopback.
        leases: Whom it asks.
        written: What its observer was told.
        is_ready: Whether it takes requests.
        state: What its status says of each model.
    """

    leases: Any
    settings: Settings
    keys: Any
    written: Written = field(default_factory=Written)
    is_ready: bool = True
    state: str = "warm"
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def front(self) -> Front:
        return Front(
            leases=self.leases,
            settings=lambda: self.settings,
            keys=lambda: self.keys,
            status=self.status,
            exposition=self.exposition,
            observe=self.written,
            is_ready=lambda: self.is_ready,
        )

    async def status(self) -> list[dict[str, Any]]:
        return [
            {"id": name, "state": self.state, "device": "host", "queue": 0}
            for name in self.settings.models
        ]

    async def exposition(self) -> str:
        return "# TYPE kvcached_gateway_queued gauge\n"


@asynccontextmanager
async def front_served(
    leases: Any,
    *,
    settings: Settings | None = None,
    keys: FakeKeys | None = None,
    body_seconds: float = 60.0,
    idle_seconds: float = 60.0,
) -> AsyncIterator[House]:
    """Serve a front on a port of the loopback."""
    house = House(leases, settings or make_settings(), keys)
    app = build_app(house.front(), body_seconds=body_seconds)
    runner = build_runner(app, idle_seconds=idle_seconds)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    house.port = runner.addresses[0][1]
    try:
        yield house
    finally:
        await runner.cleanup()


@asynccontextmanager
async def engine_served(
    complete: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> AsyncIterator[str]:
    """Serve completions as an engine that does this with each; yield its address."""
    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def say(house: House, data: bytes) -> bytes:
    """Send bytes over a connection of their own, and return all that comes until its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
    try:
        writer.write(data)
        await writer.drain()
        return await reader.read()
    finally:
        writer.close()


async def read_torn(content: aiohttp.StreamReader) -> bytes:
    """Return the rest of an answer that has to break off."""
    rest = []
    with pytest.raises(aiohttp.ClientPayloadError):  # noqa: PT012  which read it is, is open
        while chunk := await content.readany():
            rest.append(chunk)
    return b"".join(rest)
