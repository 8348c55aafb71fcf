"""Servers that yield their weights: how each is started, with vLLM or SGLang, a GPU or none."""

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from parts.vllm_servers import SHORT_FOLDER

from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import MIB
from kvcached_demo.harness.engines import VLLM, Engine
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN, make_model
from kvcached_demo.harness.servers import Servers

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.shapes import make_shape
from helpers.weights import make_weights

TESTS = Path(__file__).parents[2] / "tests"
MEMORY = "/dev/shm"  # noqa: S108  a folder of a name of its own is made there
POOL_BYTES, TINY_KV_BYTES = 160 * MIB, 64 * MIB  # of a rehearsal
EXTENSION = ("--worker-extension-cls", "helpers.watched.Watched")
ON_SIGNAL = TESTS / "helpers" / "memory_on_signal"


class YieldingServers:
    """The servers of a benchmark, their models and the copies of their weights.

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
        self.caching: set[str] = set()

    def end(self, record_path: Path) -> None:
        """End all servers, keep the ends of their logs beside the results, and drop the copies."""
        self.servers.kill()
        self.servers.keep_logs(record_path.parent, record_path.stem)
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

    def view(self, name: str) -> InstanceView:
        """Return what the ledger says of a server."""
        return self.servers.view(name)


def with_tests() -> str:
    """Return a search path on which servers find what the tests share."""
    return f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"
