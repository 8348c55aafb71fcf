"""A gateway's admin socket in a thread of its own, above rows that a test writes down."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from aiohttp import web

from helpers.waiting import PATIENCE_SECONDS
from kvcached_core.errors import ConfigError, KVCachedError
from kvcached_gateway.admin.admin import admin_app, bind_admin
from kvcached_gateway.admin.events import Events
from kvcached_gateway.admin.views import ADMIN_SOCKET, About, Decision, DeviceRow, ModelRow


class Written:
    """What the admin socket is asked, answered from rows.

    Attributes:
        rows: The models.
        steered: Each model and verb that was asked for.
        becomes: The state that a model has once it was steered.
        rest: Set once the models have come to rest.
        reloaded: What a reload says; an error is raised.
    """

    def __init__(self, *rows: ModelRow) -> None:
        self.events = Events()
        self.rows = list(rows)
        self.steered: list[tuple[str, str]] = []
        self.becomes = "warm"
        self.rest = asyncio.Event()
        self.rest.set()
        self.reloaded: str | ConfigError = "added one"
        self.is_draining = False

    def about(self) -> About:
        return About("/etc/models.yaml", "127.0.0.1:8080", 1234, 5.0, self.is_draining)

    def models(self) -> list[ModelRow]:
        return self.rows

    def devices(self) -> list[DeviceRow]:
        return [DeviceRow("host", 1000, 250, ("one",), 0.5)]

    def decisions(self) -> list[Decision]:
        return [Decision(1.5, "start", "one", "a request waits", {"needed_bytes": 7})]

    async def explain(self, model_id: str) -> str:
        return f"{model_id} is warm: a request came"

    async def steer(self, model_id: str, verb: str) -> str:
        if verb == "stop":
            raise KVCachedError(f"{model_id!r} is pinned")
        self.steered.append((model_id, verb))
        self.rows = [
            replace(row, state=self.becomes) if row.id == model_id else row for row in self.rows
        ]
        return f"{model_id} will {verb}"

    async def settled(self, model_id: str) -> None:
        await self.rest.wait()

    async def reload(self) -> str:
        if isinstance(self.reloaded, ConfigError):
            raise self.reloaded
        return self.reloaded

    def drain(self) -> None:
        self.is_draining = True


@contextmanager
def admin_running(directory: Path, *rows: ModelRow) -> Iterator[tuple[Written, Path]]:
    """Serve rows on the admin socket of a folder; give them and the socket's path."""
    path = directory / ADMIN_SOCKET
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    started: list[Written] = []
    is_up = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        started.append(Written(*rows))
        runner = web.AppRunner(admin_app(started[0]), shutdown_timeout=1)
        await runner.setup()
        await web.SockSite(runner, bind_admin(path)).start()
        is_up.set()
        await stop.wait()
        started[0].events.close()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert is_up.wait(PATIENCE_SECONDS)
    try:
        yield started[0], path
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE_SECONDS)
        loop.close()
