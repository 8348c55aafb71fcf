"""A SGLang server of two ranks, and what it is asked."""

from pathlib import Path

from helpers.sglang_engine import cores_of, large_burst, mixed_bursts, start_sglang
from helpers.wrong_block import wrong_block_variables
from kvcached_core.units import MIB
from kvcached_demo.harness.engines import SGLANG
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

# Small, so that prompts which fill it are computed soon, and with as many pages as a large one.
POOL = 256 * MIB
PAGE = 8 * MIB
MAX_TOKENS = 1024
BURSTS = [*mixed_bursts()[:2], large_burst(1, POOL)]


def start_two(
    servers: Servers, name: str, model: Path, *arguments: str, elastic: bool, **variables: str
) -> EngineServer:
    """Start a server that these arguments give two ranks; return it when it is ready."""
    server = start_sglang(
        servers,
        name,
        model,
        *arguments,
        *SGLANG.longest(MAX_TOKENS),
        elastic=elastic,
        page_bytes=PAGE,
        pool_bytes=POOL,
        variables=cores_of(2) | wrong_block_variables(servers.workspace / "plugin") | variables,
    )
    server.wait_ready()
    return server
