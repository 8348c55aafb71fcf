"""Whether we can serve this vLLM elastically, decided once before anything is changed."""

import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kvcached_core.config import Enable, read_config, read_switch
from kvcached_core.engine import refusal
from kvcached_core.engine.leaving import sweep_at_exit
from kvcached_core.engine.names import safe_name
from kvcached_core.errors import ConfigError, UnsupportedEngineError
from kvcached_patches import (
    Installed,
    Patcher,
    check_installed,
    find_installed,
    hooks_of,
    report,
)
from kvcached_patches import vllm as table

logger = logging.getLogger("vllm.kvcached")
refuse = partial(refusal.refuse, engine="vLLM", logger=logger)

# vLLM's own variable for how a KV cache lies in memory: L for layers, B for blocks.
LAYOUT = "VLLM_KV_CACHE_LAYOUT"

# Says to the processes that this one starts that the source files were checked already.
CHECKED = "_KVCACHED_VLLM_CHECKED"

_patcher: Patcher | None = None


def start() -> None:
    """Check the release and hook it; `SystemExit` with a report where that cannot be.

    With `ENABLE_KVCACHED=auto` a release that does not fit is served unpatched, with one warning,
    in this process and in those it starts.
    """
    global _patcher  # noqa: PLW0603  one process, one set of hooks
    if _patcher is not None:
        return
    try:
        switch = read_switch()
        if switch is Enable.OFF:
            return
        config = read_config()
        engine = installed()
        if os.environ.get(CHECKED) != engine.release:
            check_release(engine)
    except ConfigError as error:
        raise SystemExit(f"kvcached: {error}") from error
    except UnsupportedEngineError as error:
        refuse(error)
        return
    os.environ[CHECKED] = engine.release
    sweep_at_exit(config.dir)
    _patcher = Patcher(
        hooks_of(engine, table.HOOKS),
        on_misfit=lambda error: refuse(UnsupportedEngineError(str(error))),
    )
    _patcher.apply()


def installed() -> Installed:
    """Return the installed vLLM.

    Raises:
        UnsupportedEngineError: If there is none.
    """
    found = find_installed(table.OLDEST_RELEASES, table.PACKAGE)
    if found is None:
        raise UnsupportedEngineError(
            f"no vLLM is installed (looked for {' and '.join(table.OLDEST_RELEASES)}); install one "
            "into this environment, or unset ENABLE_KVCACHED"
        )
    return found


def check_release(engine: Installed) -> None:
    """Refuse a release that has no lock or is not what its lock says.

    Raises:
        UnsupportedEngineError: With every finding, and what to do.
    """
    findings = check_installed(engine, table.LOCKED)
    if findings:
        raise UnsupportedEngineError(report("vLLM", engine, findings))


def check_configuration(vllm_config: Any) -> None:
    """Refuse what cannot be served elastically yet.

    Raises:
        UnsupportedEngineError: With every reason and the setting to change.
    """
    refusal.check_configuration(_obstacles(vllm_config))


def can_serve(vllm_config: Any) -> bool:
    """Return whether this configuration is served elastically."""
    return not any(_obstacles(vllm_config))


def model_name(vllm_config: Any) -> str:
    """Return the last part of the model's name or path."""
    return safe_name(Path(str(vllm_config.model_config.model)).name)


def _obstacles(vllm_config: Any) -> Iterator[str]:
    device = vllm_config.device_config.device_type
    parallel = vllm_config.parallel_config
    if device not in ("cpu", "cuda") or _is_rocm(device):
        name = "rocm" if device == "cuda" else device
        yield f"device {name}: only NVIDIA GPUs and CPUs are served"
    if parallel.data_parallel_size != 1:
        yield (
            f"data parallel size {parallel.data_parallel_size}: an idle rank steps on blocks of "
            "its last requests; start one server for each rank instead"
        )
    if getattr(parallel, "decode_context_parallel_size", 1) != 1:
        yield "decode context parallelism: not served yet; set --decode-context-parallel-size 1"
    if getattr(parallel, "enable_dbo", False):
        yield "dual batch overlap: its second stream is not fenced; remove --enable-dbo"
    if getattr(parallel, "nnodes", 1) != 1:
        yield f"{parallel.nnodes} nodes: the ledger is one machine's; set --nnodes 1"
    backend = parallel.distributed_executor_backend
    if backend not in (None, "mp", "uni") and not isinstance(backend, type):
        yield f"executor {backend}: set --distributed-executor-backend mp"
    if vllm_config.kv_transfer_config is not None:
        yield "a KV connector: it may hold addresses that we unmap; remove --kv-transfer-config"
    layout = os.environ.get(LAYOUT)
    if layout and len(layout) == len("LBNHC") and not layout.startswith("LB"):  # from 0.29 on
        yield f"{LAYOUT}={layout}: a layer's blocks must lie together; unset it, or set LBNHC"
    attention = getattr(vllm_config, "attention_config", None)
    if getattr(attention, "hisparse_config", None) is not None:
        yield "HiSparse: it has block pools of its own; switch it off"


def _is_rocm(device: str) -> bool:
    if device != "cuda":
        return False
    from vllm.platforms import current_platform

    return bool(current_platform.is_rocm())
