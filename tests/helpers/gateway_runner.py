"""A runner without engines, for what a model decides; engines themselves are tested real."""

import asyncio
import os
from dataclasses import dataclass, field

from kvcached_gateway.engines.sessions import Identity
from kvcached_gateway.engines.state_file import EngineRecord
from kvcached_gateway.engines.words import Counters
from kvcached_gateway.errors import AdoptionError, EngineDiedError, EngineStartError
from kvcached_gateway.lease import Address
from kvcached_gateway.settings.config import ModelSettings

TOKEN = "10"


def record_of(model_id: str = "a") -> EngineRecord:
    """Return what an earlier gateway may have written down: of this very process."""
    return EngineRecord(
        model_id=model_id,
        engine="vllm",
        identity=Identity.of(os.getpid()),
        address=Address("http://localhost", "/engine.sock", {"Authorization": "Bearer key"}),
        devices=("host",),
        digest="d",
        instance_name=model_id,
        is_elastic=True,
        log="/engine.log",
        token=TOKEN,
        start_seconds=7.0,
        num_starts=3,
    )


@dataclass(eq=False)
class FakeEngine:
    """An engine that does what a test says; `is_alive` until it is ended to the last process."""

    end_seconds: float = 0.0
    token: str = TOKEN
    address: Address = field(default_factory=lambda: Address("http://localhost"))
    max_adapters: int = 2
    is_alive: bool = True
    is_left: bool = False
    is_well: bool = True
    num_running: int = 0
    num_tokens: int = 0
    endings: list[str] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    crashed: asyncio.Event = field(default_factory=asyncio.Event)
    model_id: str = "a"
    unknown: frozenset[str] = frozenset()  # names of its model that it does not know

    def serves(self, name: str) -> bool:
        return name not in self.unknown

    def record(self) -> EngineRecord:
        return record_of(self.model_id)

    async def ended(self) -> None:
        await self.crashed.wait()

    async def end(self, grace_seconds: float, *, is_hung: bool = False) -> str:
        self.endings.append("aborted" if is_hung else "ended")
        await asyncio.sleep(min(self.end_seconds, grace_seconds))
        self.is_alive = False
        self.crashed.set()
        return "ended with 0"

    async def leave(self) -> None:
        self.is_left = True

    async def health(self, seconds: float) -> bool:
        if not self.is_well:
            await asyncio.sleep(seconds)
        return self.is_well

    async def counters(self) -> Counters:
        if not self.is_well:
            raise EngineDiedError("silent")
        return Counters(self.num_running, 0, 0, 0, self.num_tokens)

    async def load_adapter(self, name: str, path: str) -> None:
        await asyncio.sleep(1)
        self.asked.append((name, path))
        if path == "missing":
            raise EngineStartError("there is no such adapter")

    async def unload_adapter(self, name: str) -> None:
        self.asked.append((name, "unloaded"))


class FakeRunner:
    """Starts engines when a test says so.

    Attributes:
        engines: All that were started or adopted.
        coming: The starts and adoptions that are on their way.
        num_starts: How many were begun.
    """

    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []
        self.coming: list[asyncio.Future[FakeEngine]] = []
        self.num_starts = 0
        self.tokens: list[str] = []

    @property
    def alive(self) -> list[FakeEngine]:
        return [engine for engine in self.engines if engine.is_alive and not engine.is_left]

    async def start(
        self, settings: ModelSettings, devices: tuple[str, ...], token: str
    ) -> FakeEngine:
        self.tokens.append(token)
        return await self._come()

    async def adopt(self, settings: ModelSettings, record: EngineRecord) -> FakeEngine:
        return await self._come()

    async def _come(self) -> FakeEngine:
        self.num_starts += 1
        coming: asyncio.Future[FakeEngine] = asyncio.get_running_loop().create_future()
        self.coming.append(coming)
        try:
            return await coming
        finally:
            self.coming.remove(coming)

    def succeed(self, end_seconds: float = 0.0) -> FakeEngine:
        engine = FakeEngine(end_seconds)
        self.engines.append(engine)
        self.coming[0].set_result(engine)
        return engine

    def fail(self, error: EngineStartError | AdoptionError) -> None:
        self.coming[0].set_exception(error)
