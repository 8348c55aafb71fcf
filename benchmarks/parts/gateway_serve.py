"""A `kvcached serve` process and its file of models: what our benchmarks of it ask."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml
from multi_model.model_files import make_folder, shape_bytes
from parts.giving import are_offered
from parts.vllm_servers import WITHOUT_MULTICAST
from parts.yielding_servers import MEMORY, with_tests

from kvcached_core import control
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import GIB, MIB
from kvcached_demo.harness.engines import SGLANG, VLLM, Engine
from kvcached_demo.harness.model import make_model
from kvcached_demo.harness.server import ENGINE_ENVIRON, free_port
from kvcached_gateway.admin.client import Client
from kvcached_gateway.engines.sessions import kill_session, orphans
from kvcached_gateway.engines.state_file import EngineRecord
from kvcached_gateway.lease import Address

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.gateway_life import sglang_args
from helpers.weights import make_weights

MAX_TOKENS, CHUNK_TOKENS = 4096, 2048
# Of a rehearsal: what each keeps, and what half of them cannot have at a time.
TINY_PAGE_BYTES, TINY_WEIGHTS_BYTES = 16 * MIB, 12 * MIB
UP_SECONDS, END_SECONDS = 30.0, 60.0
ENGINE_BYTES = 7 * GIB  # of the host, what a rank's processes take beside their copy of the weights
TINY_MAX_RUNNING, TINY_SGLANG_TOKENS = 16, 4096
NUM_LOG_CHARACTERS = 30_000
SERVE = "from kvcached_core.cli.app import main; main()"


def headroom_bytes(machine: Mapping[str, object], device_gib: float) -> int:
    """Return what engines leave of a GPU, so that it is as small as one of `device_gib`."""
    return max(int(str(machine["gpu_bytes"])) - int(device_gib * GIB), 0)


class Gateway:
    """A gateway in a process of its own, as `kvcached serve` starts it.

    Args:
        models: How many models it serves.
        cards: How many GPUs they share.
        tiny: Whether it is a rehearsal on a CPU.
        headroom_bytes: What engines leave of each GPU.
        tiny_kv_bytes: What a rehearsal's engines share beside what some of their weights need.
        max_starting: How many start at a time; None is what the gateway does by itself.
        is_eager: Whether a GPU's engines leave out what makes them quicker and their starts longer.
        engine: Which engine serves them.
        shape: Of each model, on a GPU.
        ranks: On how many GPUs each model is.

    Attributes:
        names: The models.
        directory: The folder of the ledgers.
        url: Where it listens.
    """

    def __init__(
        self,
        models: int,
        *,
        cards: int,
        tiny: bool,
        headroom_bytes: int,
        tiny_kv_bytes: int,
        max_starting: int | None = None,
        is_eager: bool = True,
        engine: Engine = VLLM,
        shape: str = "llama-8b",
        ranks: int = 1,
    ) -> None:
        self.names = [f"model-{number}" for number in range(models)]
        self.directory = Path(tempfile.mkdtemp(prefix="kv-", dir=MEMORY))
        self._tiny = tiny
        self._cards = cards
        self._headroom_bytes = headroom_bytes
        self._tiny_kv_bytes = tiny_kv_bytes
        self._max_starting = max_starting
        self._is_eager = is_eager
        self._engine, self._shape, self._ranks = engine, shape, ranks
        self._folder = Path(tempfile.mkdtemp(prefix="kv-", dir=MEMORY))
        self._file = self._folder / "models.yaml"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        for number, name in enumerate(self.names):
            self._make(name, number)

    def _make(self, name: str, number: int) -> None:
        if self._tiny:
            make_model(self._folder / name, seed=number)
        elif self._engine is VLLM:  # the files say their size; nobody reads them
            make_folder(self._folder / name, self._shape)
        else:  # its dummy weights are the same in every engine
            make_weights(self._folder / name, self._shape, seed=number, has_all_words=True)

    def settings(self, classes: Mapping[str, Any], class_of: Mapping[str, str]) -> dict[str, Any]:
        """Return what the file says: text, lists and tables."""
        models = {
            name: {"environment": name, "model": str(self._folder / name), "max_wait": "900s"}
            | ({"class": class_of[name]} if name in class_of else {})
            | ({"tensor_parallel": self._ranks} if self._ranks > 1 else {})
            for name in self.names
        }
        # One that moves has two engines for a while.
        num_engines = len(self.names) + self._cards // self._ranks - 1
        engine_bytes = shape_bytes(self._shape) + ENGINE_BYTES * self._ranks
        found: dict[str, Any] = {
            "listen": f"127.0.0.1:{self.port}",
            "devices": ["host"] if self._tiny else [str(card) for card in range(self._cards)],
            "host_memory": str(engine_bytes * num_engines),
            "environments": {
                name: self._environment(number) for number, name in enumerate(self.names)
            },
            "models": models,
        }
        if self._max_starting is not None:
            found["max_starting"] = self._max_starting
        if self._cards > self._ranks:
            found["placement"] = {"window": "10s", "move_gain": "0.1", "move_pause": "600s"}
        return found | ({"classes": dict(classes)} if classes else {})

    def _environment(self, number: int) -> dict[str, Any]:
        env = ENGINE_ENVIRON | {"KVCACHED_HOST_BUDGET": "85%", "KVCACHED_WEIGHTS_KEPT_SECONDS": "0"}
        args = [*self._engine.caching(is_on=False)]
        if self._tiny:
            num = len(self.names)
            pool_bytes = TINY_PAGE_BYTES * (num + 1) + TINY_WEIGHTS_BYTES * num // 2
            env["KVCACHED_HOST_POOL"] = str(pool_bytes + self._tiny_kv_bytes)
            env["VLLM_CPU_OMP_THREADS_BIND"] = str(number % (os.cpu_count() or 1))
            env |= self._engine.host_environ
            args += self._tiny_args()
        else:
            env |= {"KVCACHED_HEADROOM": str(self._headroom_bytes)}
            env |= WITHOUT_MULTICAST if self._ranks > 1 else {}
            args += self._gpu_args()
        if self._engine is VLLM and not self._tiny:
            # each has weights of its own: only a variable can say which
            env |= {"DUMMY_SEED": str(number), "PYTHONPATH": with_tests()}
        elif self._engine is SGLANG and self._tiny:
            env["TRITON_INTERPRET"] = "1"
        return {
            "engine": self._engine.name,
            "python": self._engine.python,
            "env": env,
            "args": args,
        }

    def _tiny_args(self) -> Sequence[str]:
        if self._engine is VLLM:
            return VLLM.host_options
        return sglang_args(TINY_SGLANG_TOKENS // 2, TINY_MAX_RUNNING, TINY_SGLANG_TOKENS)

    def _gpu_args(self) -> Sequence[str]:
        args = ["--disable-custom-all-reduce"] if self._ranks > 1 else []
        if self._engine is SGLANG:
            eager = ["--disable-cuda-graph"] if self._is_eager else []
            return [*args, *eager, *SGLANG.gpu_options(MAX_TOKENS), "--skip-server-warmup"]
        args += ["--load-format", "dummy", *(["--enforce-eager"] if self._is_eager else [])]
        args += ["--worker-extension-cls", "helpers.seeded.Seeded"]
        args += ["--max-model-len", str(MAX_TOKENS)]
        return [*args, "--max-num-batched-tokens", str(CHUNK_TOKENS)]

    def write(
        self, classes: Mapping[str, Any] | None = None, class_of: Mapping[str, str] | None = None
    ) -> None:
        """Write the file: with classes, and which models have which, or without."""
        self._file.write_text(yaml.safe_dump(self.settings(classes or {}, class_of or {})))

    @property
    def client(self) -> Client:
        """What the command line asks it with."""
        return Client(self.directory)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Serve in a block; behind it no engine is left."""
        self.write()
        words = [sys.executable, "-c", SERVE, "serve", str(self._file), "--dir"]
        with (self._folder / "gateway.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*words, str(self.directory)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": "/tmp"},  # noqa: S108  sockets need a short path
            )
        try:
            self._await_up()
            yield
        finally:
            self._end()

    def _await_up(self) -> None:
        until = time.monotonic() + UP_SECONDS
        while True:
            try:
                httpx.get(f"{self.url}/health").raise_for_status()
            except httpx.HTTPError:
                is_over = self._process is None or self._process.poll() is not None
                if is_over or time.monotonic() > until:
                    raise
                time.sleep(0.1)
            else:
                return

    def _end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        asyncio.run(_end_all(self.directory))

    @contextlib.contextmanager
    def recorded(self, record_path: Path) -> Iterator[None]:
        """Serve; at the end keep the ends of all logs beside the results, and remove all else."""
        try:
            with self.serving():
                yield
        finally:
            self.keep_logs(record_path.parent, record_path.stem)
            self.close()

    def instances(self) -> dict[str, InstanceView]:
        """Return what the ledgers say of the models' engines."""
        return {row.name: row for each in control.devices(self.directory) for row in each.instances}

    def addresses(self) -> dict[str, Address]:
        """Return where the engine of each model that is up listens."""
        state = json.loads((self.directory / "gateway" / "gateway.json").read_text())
        engines = [EngineRecord.from_json(each) for each in state["engines"]]
        return {each.model_id: each.address for each in engines}

    def are_copied(self) -> bool:
        """Whether every engine that is up could give its weights."""
        return are_offered(self.instances().values())

    def keep_logs(self, folder: Path, prefix: str) -> None:
        """Write the ends of all logs to a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        logs = [self._folder / "gateway.log", *(self.directory / "gateway" / "logs").glob("*.log")]
        for log in logs:
            if log.exists():
                end = log.read_text(errors="replace")[-NUM_LOG_CHARACTERS:]
                (folder / f"{prefix}-{log.name}").write_text(end)

    def close(self) -> None:
        """Remove its folders."""
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self._folder, ignore_errors=True)


async def _end_all(directory: Path) -> None:
    """End the engines of a gateway that could not do it itself."""
    for identity in orphans(directory / "gateway", []):
        await kill_session(identity)
