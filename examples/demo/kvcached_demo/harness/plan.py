"""How one server is started: data, which can be looked at before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvcached_demo.harness.engines import Engine, Words

KV = "kv"
# Sockets need a short path; every server is told that SGLang runs on a CPU, here it does not.
GPU_ENVIRON = {"TMPDIR": "/tmp", "SGLANG_USE_CPU_ENGINE": "0"}  # noqa: S108


@dataclass(frozen=True)
class Plan:
    """How one server is started.

    Attributes:
        engine: Its kind.
        name: The instance's name, also the name under which vLLM serves the model.
        arguments: What its command line ends with.
        environ: Variables on top of those that every server has.
        options: What comes before the arguments.
    """

    engine: Engine
    name: str
    arguments: Words = ()
    environ: dict[str, str] = field(default_factory=dict)
    options: Words = ()


def plan(
    engine: Engine,
    name: str,
    workspace: Path,
    *arguments: str,
    is_elastic: bool = True,
    pool_bytes: int | None = None,
    limit_bytes: int | None = None,
    options: Words | None = None,
    environ: Mapping[str, str] | None = None,
) -> Plan:
    """Return how a server is started beside those that share its workspace.

    Args:
        engine: Its kind.
        name: The instance's name.
        workspace: The folder that the ledger lies in.
        arguments: More of its command line.
        is_elastic: Whether it is ours; a vanilla one takes what its arguments say.
        pool_bytes: The host memory that elastic engines share; None on a GPU.
        limit_bytes: The most that an elastic one may hold.
        options: What comes before the arguments; on the host what serves a tiny model there.
        environ: More variables.
    """
    variables = {"KVCACHED_DIR": str(workspace / KV), "ENABLE_KVCACHED": "0"}
    variables |= GPU_ENVIRON if pool_bytes is None else {"KVCACHED_HOST_POOL": str(pool_bytes)}
    words: Words = ()
    if is_elastic:
        words, more = engine.elastic(name, limit_bytes)
        variables |= more
    if options is None:
        options = () if pool_bytes is None else engine.host_options
    return Plan(engine, name, (*arguments, *words), {**variables, **(environ or {})}, options)
