"""Servers that yield their weights, and one request at a time: what two benchmarks share."""

import argparse
import asyncio
import contextlib
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from giving import SLEEP_SECONDS, fall_asleep
from neighbour import Neighbour
from record import Record, begin_record, command_line
from vllm_servers import READY_SECONDS, SHORT_FOLDER

from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import MIB
from kvcached_demo.harness.engines import ENGINES, SGLANG, VLLM, Engine
from kvcached_demo.harness.load import Completion, make_burst
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN, make_model
from kvcached_demo.harness.servers import Servers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.shapes import make_shape
from helpers.weights import make_weights

TESTS = Path(__file__).parents[1] / "tests"
NUM_PROMPT_TOKENS, NUM_TOKENS = 128, 8
FIRST, SECOND = "first", "second"  # the names of two servers
MEMORY = "/dev/shm"  # noqa: S108  a folder of a name of its own is made there
POOL_BYTES, TINY_KV_BYTES = 160 * MIB, 64 * MIB  # of a rehearsal
EXTENSION = ("--worker-extension-cls", "helpers.watched.Watched")
ON_SIGNAL = TESTS / "helpers" / "memory_on_signal"
# Where an engine is told to forget its prefix cache.
FORGET = {VLLM.name: "/reset_prefix_cache", SGLANG.name: "/flush_cache"}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return what reads a command line; its own arguments are added to it."""
    parser = command_line(description, can_rehearse=True)
    parser.add_argument("--engine", choices=sorted(ENGINES), default=VLLM.name)
    parser.add_argument("--runner", type=int, choices=(1, 2), help="vLLM's model runner")
    parser.add_argument("--server-options", default="", help="more arguments of every server")
    return parser


class Run:
    """The servers, and what became of their requests.

    Args:
        folder: Where models, logs and the ledger lie.
        tiny: Whether it is a rehearsal on a CPU.
        runner: vLLM's model runner; None leaves it to vLLM.
        pool_bytes: What the servers of a rehearsal share.
        engine: Which engine's servers they are.
        server_options: More arguments of every server.
        shape: Of each model, on a GPU.
        has_files: Whether vLLM's servers on a GPU read their weights, too, and make up none.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tiny: bool,
        runner: int | None,
        pool_bytes: int = POOL_BYTES,
        engine: Engine = VLLM,
        server_options: Sequence[str] = (),
        shape: str = "llama-8b",
        has_files: bool = False,
    ) -> None:
        self.folder, self.tiny, self.engine = folder, tiny, engine
        self._server_options, self._shape = tuple(server_options), shape
        self._has_files = has_files
        self._models: dict[str, Path] = {}
        self.copies = Path(tempfile.mkdtemp(prefix="kv-", dir=MEMORY))
        self.servers = Servers(folder, pool_bytes if tiny else None)
        self.environ = {
            "TMPDIR": SHORT_FOLDER,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            "KVCACHED_WEIGHTS": "yield",
            "KVCACHED_WEIGHTS_KEPT_SECONDS": "0",
            "KVCACHED_WEIGHTS_DIR": str(self.copies),
            "KVCACHED_HOST_BUDGET": os.environ.get("KVCACHED_HOST_BUDGET", "85%"),
        }
        if runner is not None:
            self.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(runner - 1)
        self.right: dict[tuple[str, int], list[int]] = {}
        self.caching: set[str] = set()
        self.num_failed = self.num_wrong = 0
        self.used_before_bytes = 0  # of the device, before the first server

    def close(self, record: Record) -> None:
        """End all servers, keep the ends of their logs beside the results, and drop the copies."""
        record.add(failed=self.num_failed, wrong=self.num_wrong)
        self.servers.kill()
        self.servers.keep_logs(record.path.parent, record.path.stem)
        shutil.rmtree(self.copies, ignore_errors=True)

    def start(
        self,
        name: str,
        seed: int,
        *arguments: str,
        is_elastic: bool = True,
        is_caching: bool = False,
        model_name: str | None = None,
        **settings: str,
    ) -> None:
        """Start a server of a model with weights of its own, with a prefix cache or without.

        Servers with the same `model_name` and seed are replicas; without one it is the server's.
        """
        if is_caching:
            self.caching.add(name)
        model_name = model_name or name
        place, engine = self.folder / model_name, self.engine
        options: tuple[str, ...]
        if self.tiny:
            model = self.with_files(model_name, seed)
            size = (TINY_KV_BYTES, KV_BYTES_PER_TOKEN)
            options = (*engine.host_options, *engine.size(*size, is_elastic=True, is_host=True))
            environ = self.environ | engine.host_environ
            if engine is VLLM:
                options, environ = (*options, *EXTENSION), environ | {"PYTHONPATH": with_tests()}
        elif engine is VLLM and not self._has_files:
            model, environ = make_shape(place, self._shape), self.environ
            environ = environ | {"DUMMY_SEED": str(seed), "PYTHONPATH": with_tests()}
            options = ("--load-format", "dummy", *engine.gpu_options(8192), *EXTENSION)
        elif engine is VLLM:
            model, environ = self.with_files(model_name, seed), self.environ
            options = engine.gpu_options(8192)
        else:  # its dummy weights are the same in every server
            model = self.with_files(model_name, seed)
            options = (*engine.gpu_options(8192), "--skip-server-warmup")
            report, path = str(self.memory_path(name)), f"{ON_SIGNAL}:{with_tests()}"
            environ = self.environ | {"MEMORY_REPORT": report, "PYTHONPATH": path}
        self.servers.start(
            engine,
            name,
            model,
            *engine.caching(is_on=is_caching),
            *self._server_options,
            *arguments,
            is_elastic=is_elastic,
            options=options,
            environ=environ | settings,
        )

    def with_files(self, name: str, seed: int) -> Path:
        """Return a model's folder with its weights; they are written once."""
        if name not in self._models:
            self._models[name] = (
                make_model(self.folder / name, seed=seed)
                if self.tiny
                else make_weights(self.copies / f"model-{name}", self._shape, seed=seed)
            )
        return self._models[name]

    def call(self, name: str, method: str, *args: object) -> None:
        """Have vLLM's worker call a method of `helpers.watched`; its weights are there for it."""
        body = {"method": method, "args": [str(arg) for arg in args]}
        self.servers[name].post("/collective_rpc", body).raise_for_status()

    def memory_path(self, name: str) -> Path:
        """Return where a server's worker writes what torch holds there."""
        return self.folder / f"{name}-memory.json"

    def ask(self, name: str, num_prompt_tokens: int = NUM_PROMPT_TOKENS) -> Completion:
        """Send one request and check its tokens against those of the first time.

        What a prefix cache has was computed in another batch, so it is emptied first.
        """
        if name in self.caching:
            self._forget(name)
        burst = make_burst(
            num_requests=1,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=NUM_TOKENS,
            seed=1,
        )
        (answer,) = asyncio.run(self.servers[name].send(burst))
        self.num_failed += answer.error is not None
        right = self.right.setdefault((name, num_prompt_tokens), answer.token_ids)
        self.num_wrong += right != answer.token_ids
        return answer

    def _forget(self, name: str) -> None:
        """Empty a server's prefix cache; SGLang refuses while a request runs, or is just ending."""
        deadline = time.monotonic() + SLEEP_SECONDS
        while not (answer := self.servers[name].post(FORGET[self.engine.name])).is_success:
            if time.monotonic() > deadline:
                answer.raise_for_status()
            time.sleep(0.01)

    def load(self, name: str, num: int, num_in: int, num_out: int, *, seed: int) -> None:
        """Send requests at once, and wait until each of them is answered or has failed."""
        burst = make_burst(
            num_requests=num, num_prompt_tokens=num_in, num_output_tokens=num_out, seed=seed
        )
        answers = asyncio.run(self.servers[name].send(burst))
        self.num_failed += sum(answer.error is not None for answer in answers)

    def first_token_seconds(self, name: str, num_prompt_tokens: int = NUM_PROMPT_TOKENS) -> float:
        """Send one request and return the time to its first token."""
        return self.ask(name, num_prompt_tokens).ttft_seconds or float("nan")

    def sleep(self, name: str) -> None:
        """Let a server yield all of its weights, once its last request is over."""
        fall_asleep(name, self.servers.directory)

    def view(self, name: str) -> InstanceView:
        """Return what the ledger says of a server."""
        return self.servers.view(name)

    def wait_copied(self, *names: str) -> float:
        """Wait until those named have offered their weights: their host copies are complete."""
        start = time.monotonic()
        while any(
            view.weights_offered_bytes < view.weights_bytes or not view.weights_needed_bytes
            for view in map(self.view, names)
        ):
            if time.monotonic() > start + READY_SECONDS:
                raise RuntimeError("the host copies are not complete")
            time.sleep(0.05)
        return time.monotonic() - start

    def room_bytes(self) -> int:
        """Return what a newcomer could be promised without anybody giving anything."""
        with self.servers.open_ledger() as ledger:
            neighbour = Neighbour(ledger)
            try:
                return neighbour.room_bytes
            finally:
                neighbour.close()

    @contextlib.contextmanager
    def taken(self, num_bytes: int) -> Iterator[Neighbour]:
        """Let a row of this process be promised so many bytes for a while."""
        with self.servers.open_ledger() as ledger:
            neighbour = Neighbour(ledger)
            try:
                neighbour.take(num_bytes, 2 * MIB)
                yield neighbour
            finally:
                neighbour.close()


def first_tokens_after_sleeps(run: Run, num: int, *, num_awake: int) -> dict[str, list[float]]:
    """Ask the first server while it is awake, and then again after each of `num` sleeps.

    Returns:
        The seconds to the first token of each request.
    """
    awake = [run.first_token_seconds(FIRST) for _ in range(num_awake)]
    seconds = []
    for _ in range(num):
        run.sleep(FIRST)
        seconds.append(run.first_token_seconds(FIRST))
    return {"awake_seconds": awake, "seconds": seconds}


@contextlib.contextmanager
def recorded_run(options: argparse.Namespace, **facts: Any) -> Iterator[tuple[Run, Record]]:
    """Yield what a command line's servers run in, and the record of it; end all behind the block.

    Args:
        options: What `make_parser` has read.
        **facts: What the record says beside machine and engine.
    """
    engine, more = ENGINES[options.engine], shlex.split(options.server_options)
    with tempfile.TemporaryDirectory(prefix="kv-", ignore_cleanup_errors=True) as folder:
        record = begin_record(options)
        record.add(engine=f"{engine.title} {engine.release()}", server_options=more, **facts)
        run = Run(
            Path(folder),
            tiny=options.tiny,
            runner=options.runner,
            engine=engine,
            server_options=more,
        )
        try:
            yield run, record
        finally:
            run.close(record)


def with_tests() -> str:
    """Return a search path on which servers find what the tests share."""
    return f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"
