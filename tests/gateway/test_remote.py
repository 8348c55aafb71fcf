"""A model that is served elsewhere: found by its name, watched, never ended."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from kvcached_gateway.errors import EngineDiedError, EngineStartError
from kvcached_gateway.models.remote import NOTHING, find_remote
from kvcached_gateway.settings.config import ModelSettings

KEY = {"REMOTE_KEY": "secret"}


class Elsewhere:
    """A server that has one model, for whoever has its key."""

    def __init__(self) -> None:
        self.status = 200
        self.body: object = {"data": [{"id": "far"}]}
        self.url = ""

    async def models(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer secret":
            return web.json_response({}, status=401)
        return web.json_response(self.body, status=self.status)

    def settings(self, name: str = "far", key_env: str | None = "REMOTE_KEY") -> ModelSettings:
        return ModelSettings(id=name, url=self.url, key_env=key_env)


@asynccontextmanager
async def elsewhere() -> AsyncIterator[Elsewhere]:
    there = Elsewhere()
    app = web.Application()
    app.router.add_get("/v1/models", there.models)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    there.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield there
    finally:
        await runner.cleanup()


def test_a_remote_model_is_up_when_it_answers_and_has_the_name() -> None:
    async def main() -> None:
        async with elsewhere() as there:
            engine = await find_remote(there.settings(), KEY)
            assert engine.address.headers == {"Authorization": "Bearer secret"}
            assert await engine.health(5.0)
            assert engine.record() is None
            assert await engine.counters() == NOTHING
            there.status = 503
            assert not await engine.health(5.0)
            with pytest.raises(EngineStartError, match="not loaded into a remote model"):
                await engine.load_adapter("x", "/x")
            await engine.unload_adapter("x")
            ended = asyncio.ensure_future(engine.ended())
            assert await engine.end(5.0) == "it is not ours, and goes on"
            await ended

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "key_env", "body", "message"),
    [
        ("other", "REMOTE_KEY", {"data": [{"id": "far"}]}, "serves far, and no 'other'"),
        ("far", "REMOTE_KEY", {"data": []}, "serves nothing, and no 'far'"),
        ("far", None, {"data": []}, "answers 401"),
        ("far", "REMOTE_KEY", ["no"], "does not answer"),
    ],
)
def test_one_that_is_not_there_says_what_is(
    name: str, key_env: str | None, body: object, message: str
) -> None:
    async def main() -> None:
        async with elsewhere() as there:
            there.body = body
            with pytest.raises(EngineStartError, match=message):
                await find_remote(there.settings(name, key_env), KEY)

    asyncio.run(main())


def test_one_that_went_away_does_not_answer() -> None:
    async def main() -> None:
        async with elsewhere() as there:
            engine = await find_remote(there.settings(), KEY)
        with pytest.raises(EngineDiedError, match="does not answer"):
            await engine.names()
        await engine.leave()

    asyncio.run(main())
