"""A gateway's controller over real models, without engines, on a machine written down."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.gateway_clock import run_simulated
from helpers.gateway_ledger import row
from helpers.gateway_runner import FakeEngine
from kvcached_core.ledger.file import RowKey
from kvcached_core.units import GIB
from kvcached_gateway.control.controller import Controller
from kvcached_gateway.control.machine import DeviceMemory, MachineView
from kvcached_gateway.control.sizes import Sizes
from kvcached_gateway.engines.state_file import EngineRecord, Folder
from kvcached_gateway.errors import EngineStartError
from kvcached_gateway.lease import Ask, Ending, Lease
from kvcached_gateway.line.line import Line
from kvcached_gateway.models.fleet import Fleet
from kvcached_gateway.models.model import Model
from kvcached_gateway.settings.config import MemorySettings, ModelSettings, Settings
from kvcached_gateway.state import UP, State

NUM_TURNS = 40
OLD_SECONDS = 100.0  # longer than anybody is young, or was asked just now


@dataclass(frozen=True)
class Takes:
    """What a model takes, in GiB: its processes on the host; the rest on each of its devices.

    There it has what stays, its weights, its first page, and its longest request, if one is sent.
    """

    process: float = 1.0
    residue: float = 0.0
    weights: float = 0.0
    least: float = 0.0
    page: float = 0.0


class Engines:
    """Starts engines when a test says so; a `protocols.EngineRunner`.

    Attributes:
        coming: The starts that are on their way, by model.
        begun: Every start, in order, with its devices.
    """

    def __init__(self) -> None:
        self.coming: dict[str, asyncio.Future[FakeEngine]] = {}
        self.begun: list[tuple[str, tuple[str, ...]]] = []

    async def start(
        self, settings: ModelSettings, devices: tuple[str, ...], token: str
    ) -> FakeEngine:
        self.begun.append((settings.id, devices))
        return await self._come(settings.id)

    async def adopt(self, settings: ModelSettings, record: EngineRecord) -> FakeEngine:
        return FakeEngine(model_id=settings.id)

    async def _come(self, model_id: str) -> FakeEngine:
        coming: asyncio.Future[FakeEngine] = asyncio.get_running_loop().create_future()
        self.coming[model_id] = coming
        try:
            return await coming
        finally:
            del self.coming[model_id]


class World:
    """A controller, its models and its machine.

    Args:
        folder: Where the gateway's folder is made.
        models: What each takes; one that is also in `settings` has those.
        devices: The capacity of each device in GiB.
        host: What engines and copies may take of the host's memory in GiB.
        settings: Of a model, by its name.
        memory: The file's `memory:`.
        num_cores: How many cores there are.

    Attributes:
        yielded: Models whose weights are gone.
        waiting: What requests of a model wait for, in GiB.
        used: What requests of a model have, in GiB.
        stalled: Models whose requests wait, with nothing said of it, until their engine's turn.
        uncopied: Models whose weights have no copy, so that they are not offered.
        loaded: Models that start, and have their memory.
        look_seconds: How old what a look saw is when the controller hears of it.
    """

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, Takes],
        *,
        devices: Mapping[str, float] | None = None,
        host: float = 1000.0,
        settings: Mapping[str, dict[str, Any]] | None = None,
        memory: MemorySettings | None = None,
        num_cores: int = 64,
    ) -> None:
        self.takes = dict(models)
        self.sizes = {name: int(each * GIB) for name, each in (devices or {"gpu": 80.0}).items()}
        self.host_bytes = int(host * GIB)
        self.num_cores = num_cores
        self.more = {name: dict((settings or {}).get(name, {})) for name in models}
        self.memory = memory or MemorySettings()
        self.turn_seconds = 10.0
        self.yielded: set[str] = set()
        self.others_bytes = 0
        self.look_seconds = 0.0
        self.waiting: dict[str, float] = {}
        self.used: dict[str, float] = {}
        self.stalled: set[str] = set()
        self.uncopied: set[str] = set()
        self.loaded: set[str] = set()
        self.engines = Engines()
        self.folder = Folder(folder)
        self.clock = asyncio.get_running_loop().time
        self.fleet = Fleet(self.settings(), self.engines, self.folder)
        self.controller = Controller(self.fleet, folder, self._look, Sizes())
        self.line = Line(
            self.fleet.models,
            lambda: self.fleet.settings,
            self.clock,
            self.controller.wanted,
            self.controller.hindrance,
            self.controller.held,
        )
        self.controller.follow(self.line)
        self.fleet.on_lease.append(lambda model: self.line.changed(model.id))
        self.fleet.on_change += [
            self.controller.changed,
            lambda model, _before, _after, _why: self.line.changed(model.id),
        ]

    def settings(self) -> Settings:
        models = {
            name: ModelSettings(**({"id": name, "environment": "e", "model": "/none"} | more))
            for name, more in self.more.items()
        }
        path = Path("models.yaml")
        return Settings(path=path, models=models, memory=self.memory, turn=self.turn_seconds)

    def __getitem__(self, name: str) -> Model:
        return self.fleet.models[name]

    def look(self) -> MachineView:
        """Return the machine as its engines and those that start have it."""
        there = [
            model
            for model in self.fleet.all
            if model.engine is not None or model.state in {State.STARTING, State.DRAINING}
        ]
        devices = {name: self._device(name, there) for name in self.sizes}
        host: dict[str, int] = {}
        for model in there:
            if model.engine is not None:
                host[model.id] = host.get(model.id, 0) + self._bytes(model, "process")
        return MachineView(
            devices, self.host_bytes, host, 0, self.host_bytes, num_cores=self.num_cores
        )

    async def _look(self) -> MachineView:
        seen = self.look()
        await asyncio.sleep(self.look_seconds)
        return seen

    def _bytes(self, model: Model, what: str) -> int:
        return int(getattr(self.takes[model.id], what) * GIB)

    def _device(self, name: str, there: list[Model]) -> DeviceMemory:
        here = [
            model
            for model in there
            if name in model.devices and (model.engine is not None or model.id in self.loaded)
        ]
        rows = []
        for number, model in enumerate(here):
            weights = self._bytes(model, "weights")
            has = 0 if model.id in self.yielded else weights
            yields = model.settings.when_idle == "yield"
            kv_bytes = self._bytes(model, "page") + int(self.used.get(model.id, 0) * GIB)
            rows.append(
                row(
                    row=RowKey(number, 1),
                    name=model.settings.instance_name,
                    page_bytes=self._bytes(model, "page"),
                    resident_bytes=(has if yields else 0) + kv_bytes,
                    used_bytes=kv_bytes,
                    waiting_bytes=int(self.waiting.get(model.id, 0) * GIB),
                    weights_bytes=has if yields else 0,
                    weights_needed_bytes=weights if yields else 0,
                    weights_offered_bytes=has if yields and self._offers(model) else 0,
                    least_bytes=self._bytes(model, "least"),
                    priority=model.settings.kv.priority or 0,
                )
            )
        used = sum(
            self._bytes(model, "residue")
            + self._bytes(model, "page")
            + int(self.used.get(model.id, 0) * GIB)
            + (0 if model.id in self.yielded else self._bytes(model, "weights"))
            for model in here
        )
        return DeviceMemory(
            name, self.sizes[name], self.sizes[name] - used - self.others_bytes, tuple(rows)
        )

    def _offers(self, model: Model) -> bool:
        is_idle = not model.num_leases or model.id in self.stalled
        return is_idle and model.id not in self.uncopied

    async def tick(self) -> None:
        """Let the controller decide once, and everybody do what it said."""
        await self.settle()
        self.controller.tick(self.look(), self.clock())
        await self.settle()

    @asynccontextmanager
    async def running(self, look_seconds: float) -> AsyncIterator[None]:
        """Let the controller go on by itself, with looks that take a while."""
        self.look_seconds = look_seconds
        running = asyncio.ensure_future(self.controller.run())
        try:
            yield
        finally:
            running.cancel()

    async def settle(self) -> None:
        for _ in range(NUM_TURNS):
            await asyncio.sleep(0)

    def ask(self, name: str) -> asyncio.Task[Lease]:
        return asyncio.create_task(self.line.take(Ask(name, "/v1/completions", 10)))

    async def come(self, name: str, end_seconds: float = 0.0) -> None:
        """Let a start succeed, of an engine whose end takes a while."""
        self.engines.coming[name].set_result(FakeEngine(end_seconds, model_id=name))
        await self.settle()

    async def fail(self, name: str, *, is_out_of_memory: bool = False) -> None:
        error = EngineStartError("it cannot", is_out_of_memory=is_out_of_memory)
        self.engines.coming[name].set_exception(error)
        await self.settle()

    async def up(self, *names: str) -> None:
        """Have models up that nobody asks any more, and that are no longer young."""
        await self.up_now(*names)
        await self.age()

    async def up_now(self, *names: str, end_seconds: float = 0.0) -> None:
        """Have models up that nobody asks any more."""
        for name in names:
            asked = self.ask(name)
            await self.tick()
            await self.come(name, end_seconds)
            (await asked).end(Ending.DONE)
            await self.tick()

    @property
    def states(self) -> dict[str, State]:
        return {name: model.state for name, model in self.fleet.models.items()}

    @property
    def are_up(self) -> set[str]:
        return {name for name, state in self.states.items() if state in UP}

    def waits_for(self, name: str) -> str:
        return self.controller.hindrance(name)

    async def close(self) -> None:
        await self.fleet.close(is_kept=False, drain_seconds=0.0)
        self.folder.close()

    async def down(self, *names: str) -> None:
        """Have models down of which it is known what they take."""
        await self.up(*names)
        for name in names:
            self[name].stop("a test wants it")
            await self.settle()

    async def age(self) -> None:
        """Let time go by until nobody is young, or was asked just now."""
        await asyncio.sleep(OLD_SECONDS)


def simulated_in(test: Callable[[Path], Awaitable[None]]) -> Callable[[Path], None]:
    """Run a test's coroutine on a simulated loop, with a folder of its own."""

    def run(tmp_path: Path) -> None:
        async def main() -> None:
            await test(tmp_path)

        run_simulated(main)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run
