"""Whom a door answers: with keys everybody who has one, without keys this machine alone."""

from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from kvcached_gateway.errors import RefusedError
from kvcached_gateway.http.error_answers import refusal
from kvcached_gateway.http.headers import REQUEST_ID, request_id
from kvcached_gateway.settings.loopback import is_loopback

__all__ = ["only_here"]

FOR_ALL = frozenset({"/health", "/ready"})


def only_here(has_keys: Callable[[], bool]) -> Middleware:
    """Return a middleware that refuses others than this machine while clients need no key.

    Args:
        has_keys: Whether clients need one.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_here = request.remote is not None and is_loopback(request.remote)
        if has_keys() or request.path in FOR_ALL or is_here:
            return await handler(request)
        error = RefusedError(
            403,
            "keys_needed",
            f"without a keys_file only this machine may ask, and not {request.remote}",
        )
        return refusal(error, request_id(request.headers.get(REQUEST_ID)))

    return check
