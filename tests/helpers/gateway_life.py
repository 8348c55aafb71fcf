"""Real engines for the gateway's tests: tiny models on the CPU, as its file would name them."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.nursery import READ_AT_IMPORT, WarmProcess, nursery, start_warm
from helpers.waiting import PATIENCE_SECONDS
from kvcached_core.units import MIB
from kvcached_gateway.engines.process import Launch, launch
from kvcached_gateway.engines.runner import WORDS, Runner
from kvcached_gateway.engines.sessions import Identity
from kvcached_gateway.engines.state_file import Folder
from kvcached_gateway.models.watch import Patience
from kvcached_gateway.settings.config import Environment, ModelSettings

POOL = 512 * MIB
MAX_TOKENS = 2048
HOST = ("host",)
# What every engine of a test has, as a gateway passes its own variables on.
ENVIRON = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "KVCACHED_HOST_POOL": str(POOL),
}
QUICK = Patience(
    health_seconds=2.0,
    num_silent=2,
    still_seconds=3.0,
    hung_seconds=0.3,
    abort_seconds=0.5,
    retry_seconds=(0.2, 300.0),
)


def vllm_args(max_tokens: int, max_running: int) -> tuple[str, ...]:
    """Return what a file gives vLLM that serves a tiny model on a CPU."""
    return (
        *("--dtype", "float32", "--block-size", "32", "--max-model-len", str(max_tokens)),
        *("--enforce-eager", "--max-num-seqs", str(max_running)),
    )


def sglang_args(max_tokens: int, max_running: int, pool_tokens: int) -> tuple[str, ...]:
    """Return what a file gives SGLang that serves one."""
    return (
        *("--dtype", "float32", "--context-length", str(max_tokens)),
        *("--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
        *("--disable-cuda-graph", "--skip-server-warmup", "--grammar-backend", "none"),
        *("--mem-fraction-static", "0.3", "--max-total-tokens", str(pool_tokens)),
        *("--max-running-requests", str(max_running)),
        "--sleep-on-idle",  # else one that has nothing to do takes a core from those that have
    )


VLLM_ARGS, SGLANG_ARGS = vllm_args(MAX_TOKENS, 16), sglang_args(MAX_TOKENS, 16, 2 * MAX_TOKENS)


def environments() -> dict[str, Environment]:
    """Return the environments of both engines; `SGLANG_PYTHON` says where SGLang is."""
    vllm = os.environ.get("VLLM_PYTHON", sys.executable)
    sglang = os.environ.get("SGLANG_PYTHON", sys.executable)
    return {
        "vllm": Environment(name="vllm", engine="vllm", python=Path(vllm), args=VLLM_ARGS),
        "sglang": Environment(
            name="sglang",
            engine="sglang",
            python=Path(sglang),
            env={"TRITON_INTERPRET": "1"},
            args=SGLANG_ARGS,
        ),
    }


def settings_of(model_id: str, folder: Path, engine: str = "vllm", **more: Any) -> ModelSettings:
    """Return a model of one of those environments."""
    return ModelSettings(id=model_id, environment=engine, model=str(folder), **more)


class WarmChild:
    """A process of the nursery, which says how it ended as soon as it has: a child's parent can."""

    def __init__(self, process: WarmProcess) -> None:
        self._process = process
        self._identity = Identity.of(process.pid)
        self.pid = process.pid

    def poll(self) -> int | None:
        return None if self._identity.is_running() else self._process.wait(PATIENCE_SECONDS)


# The nursery reports the end of each process, so nobody may forget one before it has.
_KEPT: list[WarmChild] = []


def launch_warm(
    words: Sequence[str], environ: Mapping[str, str], folder: Path, output: int
) -> WarmChild:
    """Start an engine from a parent that has imported it; see `process.Launch`."""
    del folder  # it runs where the test does
    python, *arguments = words
    engine = "vllm" if any("vllm" in word for word in arguments[:2]) else "sglang"
    child = WarmChild(
        start_warm(engine, arguments, environ, output=output, errors=output, python=python)
    )
    _KEPT.append(child)
    return child


def warm_up(*engines: str) -> None:
    """Let engines be imported at the same time, before the first of them is started."""
    with ThreadPoolExecutor() as pool:
        for engine in engines:
            environment = environments()[engine]
            variables = ENVIRON | WORDS[engine].environ(
                settings_of("any", Path(), engine), environment, HOST
            )
            read = tuple((name, variables.get(name)) for name in READ_AT_IMPORT[engine])
            pool.submit(nursery, engine, str(environment.python), read)


def make_runner(
    folder: Folder,
    directory: Path,
    environ: Mapping[str, str] = ENVIRON,
    launch: Launch = launch,
    known: Mapping[str, Environment] | None = None,
) -> Runner:
    """Return a runner of such engines."""
    return Runner(
        folder,
        directory,
        lambda: environments() if known is None else known,
        {**os.environ, **environ, "TMPDIR": str(directory)},
        directory,
        launch,
    )


@contextmanager
def short_folder() -> Iterator[Path]:
    """Make a folder whose path is short enough for sockets, and remove it."""
    path = Path(tempfile.mkdtemp(prefix="kvgw-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
