"""The servers of one run: they share a folder, its ledger and their end."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.nvml import GPU_PREFIXES, free_memory_reader
from kvcached_core.ledger.view import DeviceView, InstanceView
from kvcached_demo.harness.engines import Engine
from kvcached_demo.harness.load import Burst, Completion
from kvcached_demo.harness.plan import KV, Plan, plan
from kvcached_demo.harness.server import (
    READY_SECONDS,
    EngineServer,
    Launch,
    start_cold,
    wait_ready,
)

# The default of KVCACHED_HEADROOM, as a part of what is left without it.
HEADROOM = 0.02 / 0.98
NUM_LOG_CHARACTERS = 30_000


class Servers:
    """Servers that share one ledger; all are gone behind their block.

    Args:
        workspace: The folder of their logs; the ledger lies in `directory` below it.
        pool_bytes: The host memory that they share; None on a GPU.
        launch: What starts their processes.

    Attributes:
        by_name: Those that were started, also those that have ended.
    """

    def __init__(
        self, workspace: Path, pool_bytes: int | None = None, launch: Launch = start_cold
    ) -> None:
        self.workspace = workspace
        self.directory = workspace / KV
        self.pool_bytes = pool_bytes
        self.by_name: dict[str, EngineServer] = {}
        self._launch = launch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def __getitem__(self, name: str) -> EngineServer:
        return self.by_name[name]

    def start(
        self,
        engine: Engine,
        name: str,
        model: Path,
        *arguments: str,
        launch: Launch | None = None,
        **settings: Any,
    ) -> EngineServer:
        """Start a server of `model`; see `plan` for the settings."""
        found = plan(
            engine, name, self.workspace, *arguments, pool_bytes=self.pool_bytes, **settings
        )
        return self.follow(found, model, launch=launch)

    def follow(self, found: Plan, model: Path, *, launch: Launch | None = None) -> EngineServer:
        """Start a server as a plan says, on the next core, or in the place of one of its name."""
        names = [*self.by_name]
        core = names.index(found.name) if found.name in names else len(names)
        if found.name in names:
            self[found.name].kill()
        server = EngineServer(
            found, model, self.workspace, core=core, launch=launch or self._launch
        )
        self.by_name[found.name] = server
        return server

    def wait_ready(
        self,
        *names: str,
        seconds: float = READY_SECONDS,
        tick: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Wait until those named, or all, answer; see `wait_ready`."""
        return wait_ready([self[name] for name in names or self.by_name], seconds, tick)

    async def send(self, bursts: Mapping[str, Burst]) -> dict[str, list[Completion]]:
        """Send each server named its burst, all at once, and wait for all answers."""
        answers = await asyncio.gather(*(self[name].send(bursts[name]) for name in bursts))
        return dict(zip(bursts, answers, strict=True))

    def stop(self) -> None:
        """End all politely."""
        for server in self.by_name.values():
            server.stop()

    def kill(self) -> None:
        """End all at once."""
        for server in self.by_name.values():
            server.kill()

    def keep_logs(self, folder: Path, prefix: str) -> None:
        """Write the end of each log to a folder, also of one that was killed."""
        for server in self.by_name.values():
            end = server.log.read_text(errors="replace")[-NUM_LOG_CHARACTERS:]
            (folder / f"{prefix}-{server.log.name}").write_text(end)

    def open_ledger(self) -> Ledger:
        """Open the ledger of the one device; on a GPU it knows what is free there for KV caches.

        Raises:
            LedgerError: If there is none, or more than one.
        """
        return open_ledger(self.directory)

    def device(self) -> DeviceView:
        """Return what the ledger says."""
        with self.open_ledger() as ledger:
            return ledger.view()

    def view(self, name: str) -> InstanceView:
        """Return what the ledger says of an instance.

        Raises:
            KeyError: If it is not there.
        """
        return {row.name: row for row in self.device().instances}[name]

    def resident_bytes(self, name: str) -> int:
        """Return what an instance holds; nothing if it is not there."""
        return sum(row.resident_bytes for row in self.device().instances if row.name == name)


def open_ledger(directory: Path) -> Ledger:
    """Open the one ledger of a folder; on a GPU it knows what is free there for KV caches.

    Raises:
        LedgerError: If there is none, or more than one.
    """
    paths = sorted(directory.glob("*.ledger"))
    if len(paths) != 1:
        raise LedgerError(f"{directory} has {len(paths)} ledgers; one is needed")
    (path,) = paths
    if not path.stem.startswith(GPU_PREFIXES):
        return Ledger(path)
    with Ledger(path) as ledger:
        headroom_bytes = int(ledger.capacity_bytes * HEADROOM)
    read = free_memory_reader(path.stem)
    return Ledger(path, free_bytes=lambda: read() - headroom_bytes)
