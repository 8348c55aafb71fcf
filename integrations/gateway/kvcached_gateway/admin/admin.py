"""The admin socket: fixed verbs for the gateway's own user, and nothing that names a program.

It is a Unix socket with mode 0600 in a folder with mode 0700; whoever connects has to be that user
or root, by the kernel's word. No request has a body. Gateways of a cluster reach each other
otherwise, and say who may.
"""

import asyncio
import json
import os
import socket
import struct
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from kvcached_core.errors import ConfigError, KVCachedError
from kvcached_gateway.admin.events import Events
from kvcached_gateway.admin.views import About, Decision, DeviceRow, ModelRow
from kvcached_gateway.settings.mistakes import nearest

__all__ = ["VERBS", "Steering", "admin_app", "bind_admin", "only_own_user"]

VERBS = ("warm", "sleep", "stop", "pin", "unpin")
MAX_WAIT_SECONDS = 24 * 3600.0
_CREDENTIALS = struct.Struct("3i")


class Steering(Protocol):
    """What the admin socket steers: the controller, called on the loop's thread."""

    @property
    def events(self) -> Events:
        """What happens."""

    def about(self) -> About:
        """Return what the gateway is."""

    def models(self) -> Sequence[ModelRow]:
        """Return every model of the file, in its order."""

    def devices(self) -> Sequence[DeviceRow]:
        """Return every device, and the host's memory."""

    def decisions(self) -> Sequence[Decision]:
        """Return the last decisions, the oldest first."""

    async def explain(self, model_id: str) -> str:
        """Return why a model is where it is, and what would go next."""

    async def steer(self, model_id: str, verb: str) -> str:
        """Begin to warm, sleep, stop, pin or unpin a model; return what that means, in words.

        Raises:
            KVCachedError: If that is refused; the message says why.
        """

    async def settled(self, model_id: str) -> None:
        """Wait until a model neither starts nor drains."""

    async def reload(self) -> str:
        """Read the file again, all or nothing; return what changed, in words.

        Raises:
            ConfigError: If it has a mistake; the old one holds on.
        """

    def drain(self) -> None:
        """Take no new requests, end what is there, and end."""


@web.middleware
async def only_own_user(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer the gateway's own user and root, who are at the other end of a Unix socket."""
    transport = request.transport
    peer: Any = None if transport is None else transport.get_extra_info("socket")
    if peer is not None:
        words = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, user, _ = _CREDENTIALS.unpack(words)
        if user in {os.geteuid(), 0}:
            return await handler(request)
    return web.json_response({"error": "this socket is for the gateway's own user"}, status=403)


def admin_app(steering: Steering, admits: Middleware = only_own_user) -> web.Application:
    """Return what answers on the admin socket.

    Args:
        steering: What is steered.
        admits: Who may ask: a middleware that refuses others.
    """
    admin = _Admin(steering)
    app = web.Application(middlewares=[admits, _as_json_errors], client_max_size=1)
    app.add_routes(
        [
            web.get("/admin/about", admin.about),
            web.get("/admin/models", admin.models),
            web.get("/admin/devices", admin.devices),
            web.get("/admin/decisions", admin.decisions),
            web.get("/admin/explain/{id}", admin.explain),
            web.get("/admin/events", admin.events),
            web.post("/admin/models/{id}/{verb}", admin.steer),
            web.post("/admin/reload", admin.reload),
            web.post("/admin/drain", admin.drain),
        ]
    )
    return app


def bind_admin(path: Path) -> socket.socket:
    """Return the socket, bound; only its user can have connected, from the first moment on.

    Whoever calls it holds the lock of the gateway's folder, so a file that is there is a dead one.

    Raises:
        OSError: If it cannot be bound there.
    """
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(bound.fileno(), 0o600)  # before it has a name: the file gets it with its birth
        bound.bind(str(path))
    except OSError:
        bound.close()
        raise
    return bound


class _Admin:
    """Answers for one `Steering`."""

    def __init__(self, steering: Steering) -> None:
        self._steering = steering

    async def about(self, request: web.Request) -> web.StreamResponse:
        del request
        return web.json_response(asdict(self._steering.about()))

    async def models(self, request: web.Request) -> web.StreamResponse:
        del request
        return web.json_response([asdict(row) for row in self._steering.models()])

    async def devices(self, request: web.Request) -> web.StreamResponse:
        del request
        return web.json_response([asdict(row) for row in self._steering.devices()])

    async def decisions(self, request: web.Request) -> web.StreamResponse:
        del request
        return web.json_response([asdict(each) for each in self._steering.decisions()])

    async def explain(self, request: web.Request) -> web.StreamResponse:
        row = self._known(request)
        return web.json_response({"text": await self._steering.explain(row.id)})

    async def events(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        with self._steering.events.listen() as queue, suppress(ConnectionResetError):
            await answer.prepare(request)
            while (event := await queue.get()) is not None:
                await answer.write(f"data: {json.dumps(event)}\n\n".encode())
            await answer.write_eof()
        return answer

    async def steer(self, request: web.Request) -> web.StreamResponse:
        verb = request.match_info["verb"]
        if verb not in VERBS:
            raise web.HTTPNotFound(text=f"{verb!r} is no verb; {nearest(verb, VERBS)}")
        seconds = _wait_seconds(request)
        row = self._known(request)
        text = await self._steering.steer(row.id, verb)
        is_settled = await _settled(self._steering.settled(row.id), seconds)
        row = next((each for each in self._steering.models() if each.id == row.id), row)
        return web.json_response({"text": text, "is_settled": is_settled, "model": asdict(row)})

    async def reload(self, request: web.Request) -> web.StreamResponse:
        del request
        return web.json_response({"text": await self._steering.reload()})

    async def drain(self, request: web.Request) -> web.StreamResponse:
        del request
        self._steering.drain()
        return web.json_response({"text": "it takes no new requests, and ends with the last"})

    def _known(self, request: web.Request) -> ModelRow:
        name = request.match_info["id"]
        rows = {row.id: row for row in self._steering.models()}
        if name not in rows:
            raise web.HTTPNotFound(text=f"there is no model {name!r}; {nearest(name, rows)}")
        return rows[name]


async def _settled(settling: Coroutine[Any, Any, None], seconds: float) -> bool:
    task = asyncio.get_running_loop().create_task(settling)
    await asyncio.sleep(0)  # what is settled already is, whatever the seconds are
    await asyncio.wait({task}, timeout=seconds)
    if task.done():
        task.result()
        return True
    task.cancel()
    return False


def _wait_seconds(request: web.Request) -> float:
    text = request.query.get("wait", "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise web.HTTPBadRequest(text=f"wait={text!r} is not a number of seconds up to a day")
    return seconds


@web.middleware
async def _as_json_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return web.json_response({"error": error.text or error.reason}, status=error.status)
    except ConfigError as error:
        return web.json_response({"error": str(error)}, status=422)
    except KVCachedError as error:
        return web.json_response({"error": str(error)}, status=409)
