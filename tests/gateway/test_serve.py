"""A gateway put together: limits of keys in every worker, and its end for whoever waits."""

import asyncio
import hashlib
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from helpers.gateway_life import short_folder
from helpers.loops import on_a_loop
from helpers.waiting import PATIENCE_SECONDS

from kvcached_gateway import serve
from kvcached_gateway.engines.process import Child
from kvcached_gateway.http import workers as workers_module
from kvcached_gateway.serve import Serving, serving

KEYS = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("busy", "often", "free")}

ONE_ENGINE = f"""
listen: 127.0.0.1:0
devices: [host]
environments: {{a: {{engine: vllm, python: {sys.executable}}}}}
models: {{one: {{environment: a, model: org/one}}}}
"""


@asynccontextmanager
async def silent_port() -> AsyncIterator[int]:
    """Listen, and answer nothing: what waits for a model there is in the line."""
    writers: list[asyncio.StreamWriter] = []

    async def come(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    server = await asyncio.start_server(come, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        for writer in writers:
            writer.close()
        server.close()


@asynccontextmanager
async def gateway(directory: Path, port: int, **more: Any) -> AsyncIterator[Serving]:
    keys = directory / "keys.yaml"
    keys.write_text(
        yaml.safe_dump(
            {
                "busy": {"sha256": KEYS["busy"], "max_concurrent": 2},
                "often": {"sha256": KEYS["often"], "requests_per_minute": 3},
                "free": {"sha256": KEYS["free"]},
            }
        )
    )
    keys.chmod(0o600)
    file = directory / "models.yaml"
    values = {
        "listen": "127.0.0.1:0",
        "devices": ["host"],
        "keys_file": str(keys),
        "models": {"far": {"url": f"http://127.0.0.1:{port}"}},
        **more,
    }
    file.write_text(yaml.safe_dump(values))
    async with serving(file, directory / "kv") as here:
        yield here


@asynccontextmanager
async def in_front(workers: int) -> AsyncIterator[tuple[aiohttp.ClientSession, str, Serving]]:
    """Serve a model that never answers, and a client whose every request may meet any worker."""
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(short_folder())
        port = await stack.enter_async_context(silent_port())
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        here = await stack.enter_async_context(gateway(directory, port, workers=workers))
        url = f"http://127.0.0.1:{here.port}"
        await listening(session, url)
        yield session, url, here


async def ask(session: aiohttp.ClientSession, url: str, key: str) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {key}"}
    body = {"model": "far", "prompt": "x"}
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
        return answer.status, json.loads(await answer.read())["error"]["code"]


async def listening(session: aiohttp.ClientSession, url: str) -> None:
    """Wait until a worker answers: nobody tells when one listens."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            try:
                async with session.get(f"{url}/health") as answer:
                    assert answer.status == 200
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.05)
            else:
                return


async def status_of(session: aiohttp.ClientSession, url: str) -> int:
    async with session.get(url) as answer:
        return answer.status


async def first_of(tasks: list[asyncio.Task[tuple[int, str]]], num: int) -> Counter[str]:
    """Return what the first of some requests are answered."""
    answers: Counter[str] = Counter()
    for coming in asyncio.as_completed(tasks, timeout=PATIENCE_SECONDS):
        answers[(await coming)[1]] += 1
        if answers.total() == num:
            break
    return answers


async def leave(tasks: list[asyncio.Task[tuple[int, str]]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_engines_have_the_gateways_folder_whatever_theirs_to_run_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[Path] = []

    def launch(_: object, environ: Mapping[str, str], folder: Path, __: int) -> Child:
        found.append(folder / environ["KVCACHED_DIR"])
        raise OSError("that was all")

    @on_a_loop
    async def main() -> None:
        with short_folder() as directory:
            monkeypatch.chdir(directory)
            file = directory / "models" / "models.yaml"
            file.parent.mkdir()
            file.write_text(ONE_ENGINE)
            async with serving(file, Path("kv"), launch=launch) as here:
                await here.gateway.steer("one", "warm")
                async with asyncio.timeout(PATIENCE_SECONDS):
                    while not found:  # noqa: ASYNC110  nobody tells
                        await asyncio.sleep(0.01)
            assert found[0] == directory / "kv"

    main()


@pytest.mark.parametrize("workers", [1, 3])
def test_what_a_key_may_take_holds_over_all_workers(workers: int) -> None:
    @on_a_loop
    async def main() -> None:
        async with in_front(workers) as (session, url, _):
            asked = [asyncio.create_task(ask(session, url, "busy")) for _ in range(20)]
            assert await first_of(asked, 18) == {"too_many_at_once": 18}
            often = [asyncio.create_task(ask(session, url, "often")) for _ in range(10)]
            assert await first_of(often, 7) == {"rate_limit_exceeded": 7}
            assert sum(not task.done() for task in asked) == 2
            await leave([*asked, *often])

    main()


@pytest.mark.parametrize("workers", [1, 2])
def test_whoever_still_waits_when_a_gateway_ends_is_told_so(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "DRAIN_SECONDS", 0.3)
    monkeypatch.setattr(workers_module, "LOOK_SECONDS", 2 * PATIENCE_SECONDS)  # workers are told

    @on_a_loop
    async def main() -> None:
        async with in_front(workers) as (session, url, here):
            asked = [asyncio.create_task(ask(session, url, "free")) for _ in range(6)]
            async with asyncio.timeout(PATIENCE_SECONDS):
                while here.gateway.models()[0].num_waiting < 6:  # noqa: ASYNC110  nobody tells
                    await asyncio.sleep(0.01)
            here.gateway.drain()
            async with asyncio.timeout(PATIENCE_SECONDS):
                while await status_of(session, f"{url}/ready") != 503:
                    pass
        assert [await task for task in asked] == [(503, "draining")] * 6

    main()
