"""Real SGLang servers on a CPU whose weights yield, on a device of a few pages of 2 MiB."""

from pathlib import Path

from helpers.sglang_engine import READY_SECONDS, cores_of
from helpers.waiting import await_that
from helpers.warm_servers import launch_warm
from kvcached_core.units import MIB
from kvcached_demo.harness.engines import SGLANG
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

PAGE = 2 * MIB
NUM_WEIGHTS = 6  # pages of the demo's model
# A prompt with its answer, and page 0: so much an engine needs beside its weights.
NUM_TOKENS = 128
NUM_KV_PAGES = 1 + NUM_TOKENS * KV_BYTES_PER_TOKEN // PAGE


def start_yielding(
    servers: Servers, name: str, model: Path, *arguments: str, num_ranks: int = 1, **settings: str
) -> EngineServer:
    """Start a server and wait until its weights may be given."""
    server = begin_yielding(servers, name, model, *arguments, num_ranks=num_ranks, **settings)
    server.wait_ready(READY_SECONDS)
    await_that(
        lambda: server.log.read_text().count("may be given to neighbours") == num_ranks,
    )
    return server


def begin_yielding(
    servers: Servers, name: str, model: Path, *arguments: str, num_ranks: int = 1, **settings: str
) -> EngineServer:
    """Start a server whose weights yield, with more settings."""
    assert servers.pool_bytes is not None
    return servers.start(
        SGLANG,
        name,
        model,
        *SGLANG.size(servers.pool_bytes, KV_BYTES_PER_TOKEN, is_elastic=True, is_host=True),
        *SGLANG.running(4),
        *("--context-length", str(NUM_TOKENS), "--tp-size", str(num_ranks)),
        *arguments,
        environ={
            "KVCACHED_PAGE_BYTES": str(PAGE),
            "KVCACHED_WEIGHTS": "yield",
            "KVCACHED_WEIGHTS_DIR": str(servers.workspace / "weights"),
            "KVCACHED_WEIGHTS_DISK": str(servers.workspace / "disk"),
            "KVCACHED_WEIGHTS_DISK_FREE": "0",
            "KVCACHED_WEIGHTS_KEPT_SECONDS": "0",
            "TRITON_INTERPRET": "1",
            **cores_of(num_ranks),
            **settings,
        },
        launch=launch_warm,
    )


def num_weights(servers: Servers, name: str) -> int:
    """Return how many pages of weights a server has."""
    return servers.view(name).weights_bytes // PAGE
