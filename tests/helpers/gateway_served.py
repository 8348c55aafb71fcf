"""One folder of real tiny models on the CPU, and the gateways that serve it one after the other.

The weights of all of them do not fit into the pool together, so they take turns. Engines outlive a
gateway (`engines_on_exit: keep`), so that the next one, in whatever process, has them at once.
"""

import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
import uvloop
import yaml

from helpers.gateway_life import ENVIRON, launch_warm, sglang_args, vllm_args
from helpers.waiting import PATIENCE_SECONDS
from kvcached_core.errors import KVCachedError
from kvcached_core.units import MIB
from kvcached_demo.harness.model import make_model
from kvcached_gateway.admin.client import Client, NoGatewayError
from kvcached_gateway.admin.views import ModelRow
from kvcached_gateway.engines.sessions import kill_session
from kvcached_gateway.engines.state_file import EngineRecord, Folder
from kvcached_gateway.models.model import Model
from kvcached_gateway.serve import Serving, serving
from kvcached_gateway.state import State

PAGE = 2 * MIB
# The weights of a model are 6 pages, and its longest request takes 5: two may start at a time. The
# weights of four do not fit together.
NUM_PAGES = 22
NUM_TOKENS = 256
UP_SECONDS = PATIENCE_SECONDS
LOOK_SECONDS = 0.02
ENVIRON_OF_ALL = {
    **ENVIRON,
    "KVCACHED_HOST_POOL": str(NUM_PAGES * PAGE),
    "KVCACHED_PAGE_BYTES": str(PAGE),
    "KVCACHED_WEIGHTS_KEPT_SECONDS": "0",
}
MAX_RUNNING = 4
VLLM = vllm_args(NUM_TOKENS, MAX_RUNNING)
SGLANG = sglang_args(NUM_TOKENS, MAX_RUNNING, MAX_RUNNING * NUM_TOKENS)
# What `kvcached serve` runs, also where the package's entry points are not installed.
SERVE = """
import sys
from pathlib import Path
from kvcached_gateway.settings.config_file import read_settings
from kvcached_gateway.serve import run

file, directory = map(Path, sys.argv[1:])
sys.exit(run(read_settings(file), directory, True))
"""
Models = Mapping[str, Mapping[str, Any]]


@dataclass
class Answers:
    """What came of requests.

    Attributes:
        seen: How often each status was answered; an exception's name where nothing was.
        errors: The bodies of those that were not answered as they should.
        order: The numbers of requests, as their answers came.
    """

    seen: Counter[int | str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    order: list[int] = field(default_factory=list)

    @property
    def are_all_right(self) -> bool:
        return set(self.seen) == {200}


async def ask(
    session: aiohttp.ClientSession, url: str, model: str, answers: Answers, number: int = 0
) -> None:
    """Ask a model for some tokens."""
    asked = {"model": model, "prompt": f"page {number % 7} by page", "max_tokens": 4}
    try:
        async with session.post(f"{url}/v1/completions", json=asked) as answer:
            body = await answer.text()
            answers.seen[answer.status] += 1
            if answer.status != 200:
                answers.errors.append(body)
    except aiohttp.ClientError as error:
        answers.seen[type(error).__name__] += 1
        answers.errors.append(str(error))
    answers.order.append(number)


def client() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(UP_SECONDS)
    )


def ask_all(url: str, models: Sequence[str]) -> Answers:
    """Ask models, all at once."""
    answers = Answers()

    async def main() -> None:
        async with client() as session:
            await asyncio.gather(
                *(ask(session, url, model, answers, number) for number, model in enumerate(models))
            )

    asyncio.run(main())
    return answers


def ask_in_turn(url: str, models: Sequence[str], num_at_once: int = 1) -> Answers:
    """Ask models one after the other, a few at once."""
    answers = Answers()

    async def main() -> None:
        places = asyncio.Semaphore(num_at_once)
        async with client() as session:

            async def one(number: int, model: str) -> None:
                async with places:
                    await ask(session, url, model, answers, number)

            await asyncio.gather(*(one(*each) for each in enumerate(models)))

    asyncio.run(main())
    return answers


@contextmanager
def load(url: str, *models: str, num_clients: int = 2) -> Iterator[Answers]:
    """Ask models at random inside a block, from several clients that wait for their answers."""
    answers, is_over = Answers(), threading.Event()

    async def client_of(session: aiohttp.ClientSession, seed: int) -> None:
        chosen = random.Random(seed)
        while not is_over.is_set():
            await ask(session, url, chosen.choice(models), answers, seed)

    async def main() -> None:
        async with client() as session:
            await asyncio.gather(*(client_of(session, seed) for seed in range(num_clients)))

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        yield answers
    finally:
        is_over.set()
        thread.join(UP_SECONDS)


class Inside:
    """A gateway in a thread of this process, which starts engines from warm parents."""

    def __init__(self, file: Path, directory: Path) -> None:
        self._is_up = threading.Event()
        self._file, self._directory = file, directory
        self._thread = threading.Thread(target=lambda: uvloop.run(self._serve()))
        self._error: KVCachedError | None = None
        self.here: Serving

    async def _serve(self) -> None:
        self._loop, self._is_over = asyncio.get_running_loop(), asyncio.Event()
        environ = {**os.environ, **ENVIRON_OF_ALL, "TMPDIR": str(self._directory)}
        try:
            async with serving(
                self._file, self._directory, environ=environ, launch=launch_warm
            ) as here:
                self.here = here
                self._is_up.set()
                await self._is_over.wait()
        except KVCachedError as error:
            self._error = error  # whoever waits for this raises it
        finally:
            self._is_up.set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._is_up.wait(UP_SECONDS)
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._is_over.set)
        self._thread.join(UP_SECONDS)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.here.port}"

    def call(self, work: Callable[[], Any]) -> Any:
        """Return what a function returns on the loop's thread."""

        async def run() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(UP_SECONDS)

    @property
    def pids(self) -> dict[str, int]:
        """The first process of each engine."""
        return self.call(
            lambda: {
                name: record.identity.pid
                for name, model in self.here.fleet.models.items()
                if (record := model.record())
            }
        )


class Outside:
    """A gateway in a process of its own, as `kvcached serve` starts it."""

    def __init__(self, file: Path, directory: Path, log: Path) -> None:
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(file), str(directory)],
                env={**os.environ, **ENVIRON_OF_ALL, "TMPDIR": str(directory)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.log = log
        self.client = Client(directory, UP_SECONDS)

    @property
    def url(self) -> str:
        return f"http://{self.client.about().listen}"

    def wait_up(self) -> Self:
        """Wait until it serves: nobody tells when it does."""
        end = time.monotonic() + UP_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            with suppress(NoGatewayError):
                if not self.url.endswith(":0"):  # it answers here before it listens there
                    return self
            time.sleep(LOOK_SECONDS)
        raise AssertionError(self.log.read_text()[-3000:])


class House:
    """The folder, its file and its engines.

    Args:
        path: A folder whose path is short enough for sockets.
        vllm: The names of vLLM's models, each a letter.
        sglang: Those of SGLang's.
    """

    def __init__(self, path: Path, vllm: str = "abc", sglang: str = "s") -> None:
        self.path = path
        self.directory = path / "kv"
        self.directory.mkdir(mode=0o700)
        self.file = path / "models.yaml"
        self.models: dict[str, dict[str, Any]] = {
            name: {"environment": engine, "model": str(make_model(path / name, seed=ord(name)))}
            for engine, names in (("vllm", vllm), ("sglang", sglang))
            for name in names
        }
        self.write()

    def write(self, models: Models | None = None, **more: Any) -> None:
        """Write the file."""
        environments = {
            name: {
                "engine": name,
                "python": os.environ.get(f"{name.upper()}_PYTHON", sys.executable),
                "args": list(words),
                "env": {"TRITON_INTERPRET": "1"} if name == "sglang" else {},
            }
            for name, words in (("vllm", VLLM), ("sglang", SGLANG))
        }
        self.file.write_text(
            yaml.safe_dump(
                {
                    "listen": "127.0.0.1:0",
                    "devices": ["host"],
                    "host_memory": "16GiB",
                    "engines_on_exit": "keep",
                    "memory": dict.fromkeys(
                        ("idle_before_eviction", "min_warm", "starts_apart"), "0s"
                    ),
                    "environments": environments,
                    "models": dict(self.models if models is None else models),
                    **more,
                }
            )
        )

    def inside(self) -> Inside:
        """Return a gateway that starts engines quickly."""
        return Inside(self.file, self.directory)

    def outside(self) -> Outside:
        """Start a gateway in a process of its own."""
        return Outside(self.file, self.directory, self.path / "gateway.log")

    def records(self) -> list[EngineRecord]:
        """Return what is written down of engines; no gateway may serve meanwhile."""
        with Folder(self.directory) as folder:
            return folder.read()

    def close(self) -> None:
        """End every engine that is left."""

        async def end() -> None:
            await asyncio.gather(*(kill_session(record.identity) for record in self.records()))

        asyncio.run(end())


def see_busy_ones_go(gateway: Inside) -> list[str]:
    """Return a list that names each model that is stopped while it has requests."""
    seen: list[str] = []

    def see(model: Model, before: State, after: State, _why: str) -> None:
        if after is State.DRAINING and (before is State.BUSY or model.num_leases):
            seen.append(model.id)

    gateway.call(lambda: gateway.here.fleet.on_change.append(see))
    return seen


def see_starts(gateway: Inside) -> list[set[str]]:
    """Return a list that gets whose engines come up, after each transition."""
    seen: list[set[str]] = []

    def see(_model: Model, _before: State, _after: State, _why: str) -> None:
        seen.append({one.id for one in gateway.here.fleet.all if one.state is State.STARTING})

    gateway.call(lambda: gateway.here.fleet.on_change.append(see))
    return seen


def rows_by_name(rows: Sequence[ModelRow]) -> dict[str, ModelRow]:
    return {row.id: row for row in rows}
