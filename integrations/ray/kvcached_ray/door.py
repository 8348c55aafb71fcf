"""The cluster's ingress as a Serve deployment: the gateway's own front, above nodes."""

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import ray
from aiohttp import web

from kvcached_gateway.admin.metrics import Metrics
from kvcached_gateway.admin.views import status_rows
from kvcached_gateway.errors import draining
from kvcached_gateway.http.app import build_app
from kvcached_gateway.http.door import allow_files
from kvcached_gateway.http.front import Front
from kvcached_gateway.http.limits import LimitedLeases
from kvcached_gateway.http.worker_link import read_keys
from kvcached_gateway.settings.config import Settings
from kvcached_ray.asgi import Asgi
from kvcached_ray.leases import Avoided, NodeLeases
from kvcached_ray.nearness import only_here
from kvcached_ray.report import Table
from kvcached_ray.variables import take_plain_priority
from kvcached_ray.views import device_rows, model_rows

if TYPE_CHECKING:
    from kvcached_gateway.settings.keys import Keys

__all__ = ["Door"]

RETRY_SECONDS = 0.5

_log = logging.getLogger("ray.serve")


class Door:
    """Where requests come in on a node.

    Args:
        cluster: The handle of `Cluster`.
        nodes: The handle of `Node`: Serve starts what an ingress has the handle of.
    """

    def __init__(self, cluster: Any, nodes: Any) -> None:
        del nodes
        self._cluster = cluster
        self._stack = AsyncExitStack()
        self._app: web.Application | None = None
        self._table = Table()
        self._settings: Settings | None = None
        self._keys: Keys | None = None

    async def reconfigure(self, config: object) -> None:
        """Open; Serve calls it once before the first request."""
        del config
        if self._app is not None:
            return
        allow_files()
        take_plain_priority()
        home = ray.get_runtime_context().get_node_id()
        leases = NodeLeases(lambda: self.settings, self._send, self._accuse, home)
        metrics = Metrics(
            lambda: self.settings,
            lambda: [] if self._settings is None else model_rows(self.settings, self._table.nodes),
            lambda: device_rows(self._table.nodes),
        )
        front = Front(
            leases=LimitedLeases(
                leases,
                lambda name: None if self._keys is None else self._keys.named(name),
                asyncio.get_running_loop().time,
            ),
            settings=lambda: self.settings,
            keys=lambda: self._keys,
            status=self._status,
            exposition=lambda: _at_once(metrics.exposition()),
            observe=metrics,
            is_ready=lambda: self._settings is not None,
        )
        app = build_app(front)
        app.middlewares.append(only_here(lambda: self._keys is not None))
        runner = web.AppRunner(app)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        self._app = app
        self._stack.callback(asyncio.ensure_future(self._follow(leases)).cancel)

    @property
    def settings(self) -> Settings:
        """The settings that hold now.

        Raises:
            RefusedError: If no node has said any yet.
        """
        if self._settings is None:
            raise draining()
        return self._settings

    def __serve_build_asgi_app__(self) -> Any:
        """Return what Serve calls with each request."""
        return Asgi(self._opened)

    def _opened(self) -> web.Application:
        if self._app is None:
            raise RuntimeError("the door is not open yet")
        return self._app

    async def __del__(self) -> None:
        """Close it; Serve awaits this."""
        await self._stack.aclose()

    async def _follow(self, leases: NodeLeases) -> None:
        """Go by each new table of the cluster."""
        version = -1
        while True:
            try:
                table: Table | None = await self._cluster.table.remote(version)
            except Exception:  # noqa: BLE001  the last table holds until there is a cluster again
                _log.warning("the cluster does not answer", exc_info=True)
                await asyncio.sleep(RETRY_SECONDS)
                version = -1  # the next one counts from nothing
                continue
            if table is not None:
                version = table.version
                self._take(table)
                leases.follow(table)

    def _take(self, table: Table) -> None:
        rules = table.rules
        if rules is not None and rules != self._table.rules:
            try:
                settings = Settings.model_validate_json(rules.settings)
                keys = None if rules.keys is None else read_keys(rules.keys)
            except ValueError:  # perhaps of another release; the nodes count all the same
                _log.warning("rules cannot be read; those of before hold", exc_info=True)
            else:
                self._settings, self._keys = settings, keys
        self._table = table

    async def _send(self, model_id: str, avoided: Avoided) -> str:
        try:
            return str(await self._cluster.send.remote(model_id, avoided))
        except Exception:  # noqa: BLE001  it is asked again, as long as the request waits
            _log.warning("the cluster does not say where %s goes", model_id, exc_info=True)
            return ""

    async def _accuse(self, node: str, joined: int) -> None:
        try:
            await self._cluster.gone.remote(node, joined)
        except Exception:  # noqa: BLE001  it learns of it all the same, by silence
            _log.warning("the cluster could not be told of node %s", node, exc_info=True)

    async def _status(self) -> list[dict[str, Any]]:
        return status_rows(model_rows(self.settings, self._table.nodes))


async def _at_once(text: str) -> str:
    return text
