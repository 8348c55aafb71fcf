"""An application of Ray Serve that only streams; `ray_overhead` compares ours with it.

It has the settings that ours has, so what it lacks is what ours adds. Run in Ray's environment.
"""

from collections.abc import AsyncIterator

import aiohttp
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

from kvcached_ray.application import ONE_LOOP, QUIET

EVENT = b'data: {"choices": [{"index": 0, "delta": {"content": " word"}}]}\n\n'
LAST = b"data: [DONE]\n\n"
PATH = "/v1/chat/completions"


@serve.deployment(
    max_ongoing_requests=1_000,
    logging_config=QUIET,
    ray_actor_options={"num_cpus": 0, "runtime_env": ONE_LOOP},
)
class Bare:
    """Streams events.

    Args:
        url: A server whose events it passes on; without one they are its own.
    """

    def __init__(self, url: str | None) -> None:
        self._url = url
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, request: Request) -> StreamingResponse:
        """Answer a request."""
        stream = self._own if self._url is None else self._passed
        return StreamingResponse(stream(await request.body()), media_type="text/event-stream")

    async def _own(self, body: bytes) -> AsyncIterator[bytes]:
        del body
        yield EVENT
        yield LAST

    async def _passed(self, body: bytes) -> AsyncIterator[bytes]:
        if self._session is None:
            self._session = aiohttp.ClientSession()
        async with self._session.post(f"{self._url}{PATH}", data=body) as answer:
            async for data in answer.content.iter_any():
                yield data


def app(arguments: dict[str, str]) -> serve.Application:
    """Return the application, for Serve's file: `url` is a server, or not there."""
    return Bare.bind(arguments.get("url"))
