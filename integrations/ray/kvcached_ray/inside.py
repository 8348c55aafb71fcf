"""How doors and the cluster reach a node's gateway: HTTP between nodes, with a token."""

import hmac
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

__all__ = ["TOKEN", "Fetching", "listen_inside", "with_token"]

TOKEN = "X-Kvcached-Token"  # noqa: S105  the name of a header; engines and clients never see it


def with_token(token: str) -> Middleware:
    """Return a middleware that answers only requests with the token."""
    known = token.encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        # aiohttp keeps bytes of a header that are not UTF-8 as surrogates.
        given = request.headers.get(TOKEN, "").encode(errors="surrogateescape")
        if hmac.compare_digest(given, known):
            return await handler(request)
        return web.json_response({"error": "this port is for the cluster's own doors"}, status=403)

    return check


class Fetching:
    """A node's gateway, as the cluster steers it: a reload fetches the cluster's file first.

    Args:
        gateway: An `admin.Steering`.
        reload: What a reload does.
    """

    def __init__(self, gateway: Any, reload: Callable[[], Awaitable[str]]) -> None:
        self._gateway = gateway
        self._reload = reload

    def __getattr__(self, name: str) -> Any:
        """Return what the gateway has."""
        return getattr(self._gateway, name)

    async def reload(self) -> str:
        """See `Steering.reload`."""
        return await self._reload()


async def listen_inside(stack: AsyncExitStack, runner: web.AppRunner, host: str) -> str:
    """Listen on any free port of an address until the stack is left; return the URL."""
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, host, 0)
    await site.start()
    port = int(runner.addresses[0][1])
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
