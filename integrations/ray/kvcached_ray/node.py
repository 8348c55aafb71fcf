"""The gateway of one machine as a Serve deployment: one replica a node, engines its children."""

import asyncio
import logging
import secrets
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import ray
from aiohttp import web
from ray.util import get_node_ip_address

from kvcached_core.errors import ConfigError
from kvcached_gateway.admin.admin import admin_app
from kvcached_gateway.control.steering import Gateway
from kvcached_gateway.http.app import build_app, build_runner
from kvcached_gateway.http.door import allow_files
from kvcached_gateway.http.front import Front
from kvcached_gateway.serve import Serving, serving
from kvcached_gateway.settings.files import write_own
from kvcached_ray.inside import Fetching, listen_inside, with_token
from kvcached_ray.report import Place
from kvcached_ray.reporting import Reporter
from kvcached_ray.variables import engine_variables, own_directory, take_plain_priority

__all__ = ["Node"]

FILE = Path("ray") / "models.yaml"  # in KVCACHED_DIR
TOKEN_BYTES = 32

_log = logging.getLogger("ray.serve")


class Node:
    """The gateway of this node.

    Args:
        cluster: The handle of `Cluster`.
    """

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._stack = AsyncExitStack()
        self._directory = own_directory()
        self._here: Serving | None = None
        self._front: Front | None = None
        self._place: Place | None = None
        self._reporter: Reporter | None = None

    async def reconfigure(self, config: object) -> None:
        """Begin to serve; Serve calls it once before anything else.

        Raises:
            ConfigError: If the file of models has a mistake.
        """
        del config
        if self._here is None:
            await self._begin(await self._fetch(is_new=False))

    async def __del__(self) -> None:
        """End the gateway, and its engines unless they are kept; Serve awaits this."""
        if self._here is not None and self._reporter is not None:
            self._here.gateway.drain()
            await self._reporter.report()  # doors send their requests elsewhere from now on
        await self._stack.aclose()

    async def _fetch(self, *, is_new: bool) -> Path:
        """Write down the file of models that the cluster has; return where."""
        text = await self._cluster.models.remote(is_new=is_new)
        return _write(self._directory / FILE, text)

    async def _reload(self) -> str:
        """Go by the cluster's new file, or not at all; see `Steering.reload`."""
        if self._here is None:
            raise RuntimeError("nothing is served yet")
        await self._fetch(is_new=True)
        try:
            return await self._here.gateway.reload()
        except ConfigError:
            await self._fetch(is_new=False)
            raise
        finally:
            if self._reporter is not None:
                self._reporter.news.set()

    async def _begin(self, file: Path) -> None:
        allow_files()
        if not take_plain_priority():
            _log.warning("engines run at a low priority; start Ray with RAY_worker_niceness=0")
        here = self._here = await self._stack.enter_async_context(
            serving(file, self._directory, environ=engine_variables(), listen=self._listen)
        )
        if self._front is None or self._place is None:
            raise RuntimeError("it serves and has not listened")
        reporter = self._reporter = Reporter(
            self._place, here.gateway, here.controller, self._front, self._cluster.report.remote
        )
        here.fleet.on_change.append(reporter.changed)
        await reporter.report()
        self._stack.callback(asyncio.ensure_future(reporter.run()).cancel)

    async def _listen(self, stack: AsyncExitStack, front: Front, gateway: Gateway) -> int:
        """Listen to the cluster's doors, as `serve.Listen` says; the port is no client's."""
        host, token = get_node_ip_address(), secrets.token_hex(TOKEN_BYTES)
        # Doors have checked the keys; what a key may set comes with the request.
        inner = build_app(Front(**{**vars(front), "keys": lambda: None}))
        inner.middlewares.append(with_token(token))
        steering = Fetching(gateway, self._reload)
        admin = web.AppRunner(admin_app(steering, with_token(token)), access_log=None)
        self._front = front
        self._place = Place(
            *_names(host),
            url=await listen_inside(stack, build_runner(inner), host),
            admin_url=await listen_inside(stack, admin, host),
            token=token,
        )
        return 0


def _write(file: Path, text: str) -> Path:
    """Write the file of models where only its user can change it."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_own(file, text)
    return file


def _names(host: str) -> tuple[str, str, frozenset[str]]:
    """Return this node's id, its name, and all that `nodes:` of a model may call it by."""
    id_ = ray.get_runtime_context().get_node_id()
    nodes: dict[str, Any] = {node["NodeID"]: node for node in ray.nodes()}
    found = nodes.get(id_, {})
    name = found.get("NodeName") or host
    labels = found.get("Labels") or {}
    words = {id_, name, host, socket.gethostname(), *(f"{k}={v}" for k, v in labels.items())}
    return id_, name, frozenset(words)
