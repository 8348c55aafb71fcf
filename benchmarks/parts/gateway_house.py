"""The servers that `gateway_overhead` compares, each in processes of its own.

Ours is the gateway's data path, line and metrics, whose models are engines elsewhere: the stand-in.
"""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import psutil
import uvloop
from aiohttp import web
from parts import gateway_standin

from kvcached_demo.harness.server import free_port
from kvcached_gateway.admin.metrics import Metrics
from kvcached_gateway.errors import RefusedError
from kvcached_gateway.http.app import build_app, build_runner
from kvcached_gateway.http.front import Front
from kvcached_gateway.http.workers import Workers
from kvcached_gateway.lease import Address, Ask, Ending, Lease, Woken
from kvcached_gateway.line.line import Line, Readiness
from kvcached_gateway.settings.config import ModelSettings, Settings

START_SECONDS = 120.0
# It does not start without a key otherwise; ours has none here either.
UNLOCKED = {"LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
SPAWN = multiprocessing.get_context("spawn")


class _Held:
    """A lease to the stand-in."""

    def __init__(self, model_id: str, address: Address, waited_seconds: float) -> None:
        self.model_id = model_id
        self.address = address
        self.woken = Woken.NONE
        self.waited_seconds = waited_seconds

    def first_byte(self) -> None:
        """See `Lease`."""

    def end(self, ending: Ending, *, status: int = 0) -> None:
        """See `Lease`."""


class _Always:
    """A model that is up and takes every request: the line and all behind it do their work."""

    readiness = Readiness.UP
    start_seconds = 0.0
    devices = ("host",)

    def __init__(self, model_id: str, url: str) -> None:
        self.id = model_id
        self._address = Address(url)

    def grant(self, ask: Ask, waited_seconds: float) -> Lease | None:
        """See `Grantor`."""
        del ask
        return _Held(self.id, self._address, waited_seconds)

    def refusal(self) -> RefusedError | None:
        """See `Grantor`."""
        return None


class Server:
    """A server that runs, and what it takes of the processor.

    Attributes:
        port: Where it listens.
    """

    def __init__(self, port: int, pid: int) -> None:
        self.port = port
        self._process = psutil.Process(pid)

    def cpu_seconds(self) -> float:
        """Return what it took since its start, with the processes that it started."""
        processes = [self._process, *self._process.children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in processes)


def _serve_gateway(port: int, urls: dict[str, str], num_workers: int, is_up: Event) -> None:
    models = {name: ModelSettings(id=name, url=url) for name, url in urls.items()}
    settings = Settings(path=Path("models.yaml"), models=models)

    async def run() -> None:
        metrics = Metrics(lambda: settings, list, list)
        grantors = {name: _Always(name, url) for name, url in urls.items()}
        line = Line(
            grantors, lambda: settings, asyncio.get_running_loop().time, lambda _model: None
        )

        async def status() -> list[dict[str, Any]]:
            return [{"id": name} for name in urls]

        async def exposition() -> str:
            return metrics.exposition()

        front = Front(line, lambda: settings, lambda: None, status, exposition, metrics)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        if num_workers > 1:
            workers = Workers(front, "127.0.0.1", port, num_workers)
            workers.start()
            is_up.set()
            await ended.wait()
            await workers.stop()
            return
        runner = build_runner(build_app(front))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        is_up.set()
        await ended.wait()
        await runner.cleanup()

    uvloop.run(run())


@contextlib.contextmanager
def _child(target: Callable[..., None], *arguments: Any) -> Iterator[int]:
    is_up = SPAWN.Event()
    process = SPAWN.Process(target=target, args=(*arguments, is_up))
    process.start()
    try:
        if not is_up.wait(START_SECONDS) or process.pid is None:
            raise RuntimeError(f"{target.__name__} did not start")
        yield process.pid
    finally:
        process.terminate()
        process.join()


def _serve_standin(port: int, is_up: Event) -> None:
    gateway_standin.serve(port, is_up.set)


@contextlib.contextmanager
def standin() -> Iterator[Server]:
    """Run a server that streams as fast as it is asked."""
    port = free_port()
    with _child(_serve_standin, port) as pid:
        yield Server(port, pid)


@contextlib.contextmanager
def gateway(urls: dict[str, str], num_workers: int = 1) -> Iterator[Server]:
    """Run ours in front of servers, by the names of their models."""
    port = free_port()
    with _child(_serve_gateway, port, urls, num_workers) as pid:
        _await_answer(port, "/health")
        if num_workers > 1:
            time.sleep(3)  # until all of them listen: nobody tells
        yield Server(port, pid)


@contextlib.contextmanager
def litellm(python: Path, url: str, folder: Path) -> Iterator[Server]:
    """Run LiteLLM's proxy in front of a server, with one worker and what it does by default."""
    port = free_port()
    config = folder / "litellm.yaml"
    config.write_text(
        "model_list:\n  - model_name: '*'\n    litellm_params:\n"
        f"      model: openai/*\n      api_base: {url}/v1\n      api_key: none\n"
        "litellm_settings:\n  telemetry: false\n"
    )
    with (folder / "litellm.log").open("wb") as log:
        process = subprocess.Popen(
            [
                str(python.with_name("litellm")),
                *("--config", str(config), "--host", "127.0.0.1", "--port", str(port)),
            ],
            env={
                **os.environ,
                "PYTHONPATH": "",
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                **UNLOCKED,
            },
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _await_answer(port, "/health/liveliness")
        yield Server(port, process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _await_answer(port: int, path: str) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5):
                return
        except (OSError, urllib.error.URLError):
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
