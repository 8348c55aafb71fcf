"""Where a gateway listens: the public port, and the admin socket of its own user."""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from aiohttp import web

from kvcached_gateway.admin.admin import Steering, admin_app, bind_admin
from kvcached_gateway.admin.views import ADMIN_SOCKET
from kvcached_gateway.control.steering import Gateway
from kvcached_gateway.http.app import build_app, build_runner
from kvcached_gateway.http.door import Door
from kvcached_gateway.http.front import Front
from kvcached_gateway.http.workers import Workers

__all__ = ["LAST_SECONDS", "Listen", "listen_for_admin", "listen_for_all"]

LAST_SECONDS = 3.0  # for answers whose end is on its way

# Opens what requests come in by, until the stack is left; returns the port.
Listen = Callable[[AsyncExitStack, Front, Gateway], Awaitable[int]]


async def listen_for_all(stack: AsyncExitStack, front: Front, gateway: Gateway) -> int:
    """Listen on the public port, as `Listen` says."""
    settings = front.settings()
    if settings.workers > 1:
        workers = Workers(front, settings.host, settings.port, settings.workers)
        workers.start()
        gateway.on_rules.append(workers.changed)
        stack.push_async_callback(workers.stop)
        return workers.port
    runner = build_runner(build_app(front), last_seconds=LAST_SECONDS)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await Door(runner, front, settings.host, settings.port).start()
    return int(runner.addresses[0][1])


async def listen_for_admin(stack: AsyncExitStack, steering: Steering, directory: Path) -> None:
    """Listen on the admin socket of a folder, until the stack is left."""
    runner = web.AppRunner(admin_app(steering), access_log=None)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    stack.callback(steering.events.close)
    path = directory / ADMIN_SOCKET
    await web.SockSite(runner, bind_admin(path)).start()
    stack.callback(path.unlink, missing_ok=True)
