"""The public HTTP front: an allow-list of paths, and the way of a request to its passage."""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from kvcached_gateway.errors import RefusedError, draining
from kvcached_gateway.http.access import admit, permit
from kvcached_gateway.http.body import BODY_SECONDS, read_body, read_wish
from kvcached_gateway.http.error_answers import refusal
from kvcached_gateway.http.front import Front
from kvcached_gateway.http.headers import REQUEST_ID, request_id
from kvcached_gateway.http.own_paths import OwnPaths
from kvcached_gateway.http.passage import ID, MODEL_ID, Passage
from kvcached_gateway.http.proxy import Proxy

__all__ = ["ENGINE_PATHS", "build_app", "build_runner"]

ENGINE_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    *("/rerank", "/v1/rerank", "/v2/rerank"),
    *("/score", "/v1/score"),
    *("/pooling", "/v1/pooling"),
    *("/classify", "/v1/classify"),
    *("/tokenize", "/v1/tokenize"),
    *("/detokenize", "/v1/detokenize"),
)
MAX_LINE_BYTES = 8190
IDLE_SECONDS = 75.0  # of a connection without a whole head of a request
LINGERING_SECONDS = 1.0
LAST_SECONDS = 30.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(front: Front, *, body_seconds: float = BODY_SECONDS) -> web.Application:
    """Return the application that answers the public port.

    Args:
        front: What it answers with.
        body_seconds: How long a body may take to come.
    """
    app = web.Application()
    proxy = Proxy()
    ask = _refusing(front, _asking(front, proxy, body_seconds))
    for path in ENGINE_PATHS:
        app.router.add_post(path, ask)
    own = OwnPaths(front)
    for path, handler in {
        "/v1/models": own.models,
        "/v1/models/{id:.+}": own.model,
        "/health": own.health,
        "/ready": own.ready,
        "/metrics": own.metrics,
    }.items():
        app.router.add_get(path, _refusing(front, handler))
    app.router.add_route("*", "/{path:.*}", _refusing(front, _not_found))

    async def close(_: web.Application) -> None:
        await proxy.close()

    app.on_cleanup.append(close)
    return app


def build_runner(
    app: web.Application,
    *,
    idle_seconds: float = IDLE_SECONDS,
    last_seconds: float = LAST_SECONDS,
) -> web.AppRunner:
    """Return what serves `build_app`'s, with the limits and the cancelling that it relies on.

    Args:
        app: The application.
        idle_seconds: How long a connection may be without a whole head of a request.
        last_seconds: How long requests that run may go on when the runner is cleaned up.
    """
    return web.AppRunner(
        app,
        handler_cancellation=True,  # a client that leaves ends its request
        access_log=None,
        keepalive_timeout=idle_seconds,
        lingering_time=LINGERING_SECONDS,
        max_line_size=MAX_LINE_BYTES,
        max_field_size=MAX_LINE_BYTES,
        auto_decompress=False,
        shutdown_timeout=last_seconds,
    )


def _refusing(front: Front, handler: Handler) -> Handler:
    """Return a handler that answers with what `handler` refuses."""

    async def answer(request: web.Request) -> web.StreamResponse:
        id_ = request[ID] = request_id(request.headers.get(REQUEST_ID))
        try:
            return await handler(request)
        except RefusedError as error:
            front.observe.refused(request.get(MODEL_ID), error.code)
            return refusal(error, id_)

    return answer


def _asking(front: Front, proxy: Proxy, body_seconds: float) -> Handler:
    """Return the handler of what goes to an engine."""

    async def ask(request: web.Request) -> web.StreamResponse:
        arrived = asyncio.get_running_loop().time()
        if not front.is_ready():
            raise draining()
        key = admit(front, request.headers)
        body = await read_body(request, front.settings().max_body_bytes, body_seconds)
        wish = read_wish(body, request.headers.get("Content-Type", ""))
        permitted = permit(front, key, request.headers, wish, request.path, len(body))
        if permitted.model is not None:
            request[MODEL_ID] = permitted.model.id
        return await Passage(front, proxy, request, body, permitted, arrived).serve()

    return ask


async def _not_found(request: web.Request) -> web.StreamResponse:
    raise RefusedError(
        404, "path_not_found", f"{request.method} {request.path} is not a path of this gateway"
    )
