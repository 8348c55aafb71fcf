"""A whole gateway over real tiny models, on the loop of the test that asks it."""

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from helpers.gateway_life import ENVIRON, environments, launch_warm, short_folder, warm_up
from helpers.waiting import PATIENCE_SECONDS
from kvcached_gateway.engines.sessions import members
from kvcached_gateway.models.model import Model
from kvcached_gateway.serve import Serving, serving
from kvcached_gateway.state import State

GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
Answer = tuple[int, dict[str, Any]]


def write_file(file: Path, models: Mapping[str, Mapping[str, Any]], **more: Any) -> None:
    """Write a file of models, with the environments of both engines."""
    known = {
        name: {
            "engine": name,
            "python": str(each.python),
            "env": each.env,
            "args": list(each.args),
        }
        for name, each in environments().items()
    }
    values = {
        "listen": "127.0.0.1:0",
        "devices": ["host"],
        "host_memory": "16GiB",
        "memory": dict.fromkeys(("idle_before_eviction", "min_warm", "starts_apart"), "0s"),
        "environments": known,
        "models": dict(models),
        **more,
    }
    file.write_text(json.dumps(values))  # which is YAML without aliases


class RealGateway:
    """A gateway that serves while `run` runs, with the folder that it has."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self.folder = folder
        self.directory = folder / "kv"
        self.file = folder / "models.yaml"
        self.models: dict[str, dict[str, Any]] = {}
        self._environ = {**os.environ, **ENVIRON, **environ, "TMPDIR": str(folder)}
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self.here: Serving
        self.session: aiohttp.ClientSession

    def run(self, main: Callable[[], Awaitable[None]]) -> None:
        async def limited() -> None:
            async with asyncio.timeout(2 * PATIENCE_SECONDS):  # of many steps
                await main()

        self._runner.run(limited())

    async def open(self) -> None:
        self.write()
        self.here = await self._stack.enter_async_context(
            serving(
                self.file,
                self.directory,
                environ=self._environ,
                launch=launch_warm,
            )
        )
        connector = aiohttp.TCPConnector(limit=0)
        self.session = await self._stack.enter_async_context(
            aiohttp.ClientSession(f"http://127.0.0.1:{self.here.port}", connector=connector)
        )

    def close(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()

    def write(self, **more: Any) -> None:
        write_file(self.file, self.models, **more)

    def __getitem__(self, name: str) -> Model:
        return self.here.fleet.models[name]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.here.port}"

    def pid(self, name: str) -> int:
        record = self[name].record()
        assert record is not None
        return record.identity.pid

    async def ask(self, name: str, prompt: str = "memory follows the load", **more: Any) -> Answer:
        body = {"model": name, "prompt": prompt, **GREEDY, **more}
        async with self.session.post("/v1/completions", json=body) as answer:
            return answer.status, json.loads(await answer.read())

    async def text(self, name: str) -> str:
        """Return what a model answers, which it has to."""
        status, body = await self.ask(name)
        assert status == 200, body
        return str(body["choices"][0]["text"])

    async def come_to(self, name: str, *states: State) -> None:
        """Wait until a model is in one of some states."""
        model, came = self[name], asyncio.Event()

        def look(_model: Model, _before: State, after: State, _why: str) -> None:
            if after in states:
                came.set()

        if model.state not in states:
            model.on_change.append(look)
            await came.wait()
            model.on_change.remove(look)

    async def warm(self, name: str) -> None:
        await self.here.gateway.steer(name, "warm")
        await self.here.gateway.settled(name)

    async def stop(self, name: str) -> None:
        await self.here.gateway.steer(name, "stop")
        await self[name].settled()

    @contextmanager
    def silent(self, name: str) -> Iterator[None]:
        """Let a model's engine take requests inside the block, and answer none before its end."""
        record = self[name].record()
        assert record is not None
        pids = members(record.identity)
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)


@contextmanager
def gateway_of(
    models: Callable[[Path], dict[str, dict[str, Any]]], **environ: str
) -> Iterator[RealGateway]:
    """Serve models, made in a folder of their own."""
    warm_up("vllm")
    with short_folder() as folder:
        gateway = RealGateway(folder, environ)
        gateway.models = models(folder)
        gateway.run(gateway.open)
        try:
            yield gateway
        finally:
            gateway.close()
