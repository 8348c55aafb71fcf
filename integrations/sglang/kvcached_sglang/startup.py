"""Whether we can serve this SGLang elastically, decided once before anything is changed."""

import logging
import os
from collections.abc import Iterator
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from kvcached_core import refusal
from kvcached_core.config import Enable, read_config, read_switch
from kvcached_core.errors import ConfigError, UnsupportedEngineError
from kvcached_core.names import safe_name
from kvcached_patches import (
    Installed,
    Patcher,
    check_installed,
    find_installed,
    hooks_of,
    report,
)
from kvcached_patches import sglang as table

logger = logging.getLogger("sglang.kvcached")
refuse = partial(refusal.refuse, engine="SGLang", logger=logger)

# Says to the processes that this one starts that the source files were checked already.
CHECKED = "_KVCACHED_SGLANG_CHECKED"

# What a server of these settings would do with KV memory is not ours to lay out.
OBSTACLES = {
    "pp_size": (1, "pipeline parallelism: not served yet; set --pp-size 1"),
    "dp_size": (1, "data parallelism: start one server for each rank instead"),
    "dcp_size": (1, "decode context parallelism: not served yet; set --dcp-size 1"),
    "attn_cp_size": (1, "context parallelism: not served yet; set --attn-cp-size 1"),
    "nnodes": (1, "several nodes: the ledger is one machine's; set --nnodes 1"),
    "disaggregation_mode": (
        "null",
        "disaggregation: a transfer engine holds KV addresses; set --disaggregation-mode null",
    ),
    "enable_hierarchical_cache": (
        False,
        "HiCache: it copies while pages may go; remove --enable-hierarchical-cache",
    ),
    "enable_lmcache": (False, "LMCache: it holds KV addresses; remove --enable-lmcache"),
    "enable_flexkv": (False, "FlexKV: it holds KV addresses; remove --enable-flexkv"),
    "enable_hisparse": (False, "HiSparse: it has pools of its own; remove --enable-hisparse"),
    "enable_unified_memory": (
        False,
        "unified memory: sub-pools share one region already; remove --enable-unified-memory",
    ),
    "enable_page_major_kv_layout": (
        False,
        "a block's layers lie side by side; remove --enable-page-major-kv-layout",
    ),
    "speculative_algorithm": (
        None,
        "speculative decoding: drafts have pools of their own; remove --speculative-algorithm",
    ),
    "dllm_algorithm": (None, "diffusion models: not served yet; remove --dllm-algorithm"),
}

# Mixes of full and sliding-window layers, all of one size: they are right in one pool, too.
ONE_POOL_MODELS = frozenset(
    {
        "GptOssForCausalLM",
        "LagunaForCausalLM",
        "Llama4ForConditionalGeneration",
        "MellumForCausalLM",
    }
)

# Attention that reads the window's pool at ids of that pool. SGLang's others read it at ids of the
# other one: right as long as both hand out the same ones, which ours never do.
TWO_POOL_BACKENDS = frozenset({"fa3", "fa4", "flashinfer", "triton", "trtllm_mha"})

_flags: Patcher | None = None
_patcher: Patcher | None = None


def add_flags() -> None:
    """Add `--enable-kvcached` and its companions to SGLang's arguments."""
    global _flags  # noqa: PLW0603  one process, one set of hooks
    if _flags is None:
        _flags = Patcher(table.FLAG_HOOKS)
        _flags.apply()


def start() -> None:
    """Check the release and hook it if the switch is on; `SystemExit` where that cannot be.

    SGLang's plugin loader swallows exceptions; `SystemExit` is none that it catches.
    """
    global _patcher  # noqa: PLW0603  one process, one set of hooks
    if _patcher is not None:
        return
    try:
        if read_switch() is Enable.OFF:
            return
        read_config()
        engine = installed()
        if os.environ.get(CHECKED) != engine.release:
            check_release(engine)
    except ConfigError as error:
        raise SystemExit(f"kvcached: {error}") from error
    except UnsupportedEngineError as error:
        refuse(error)
        return
    os.environ[CHECKED] = engine.release
    _patcher = Patcher(
        hooks_of(engine, table.HOOKS),
        on_misfit=lambda error: refuse(UnsupportedEngineError(str(error))),
    )
    _patcher.apply()


def installed() -> Installed:
    """Return the installed SGLang.

    Raises:
        UnsupportedEngineError: If there is none.
    """
    found = find_installed(table.OLDEST_RELEASES, table.PACKAGE)
    if found is None:
        raise UnsupportedEngineError(
            "no SGLang is installed; install it into this environment, or unset ENABLE_KVCACHED"
        )
    return found


def check_release(engine: Installed) -> None:
    """Refuse a release that has no lock or is not what its lock says.

    Raises:
        UnsupportedEngineError: With every finding, and what to do.
    """
    findings = check_installed(engine, table.ALL_HOOKS)
    if findings:
        raise UnsupportedEngineError(report("SGLang", engine, findings))


def check_configuration(runner: Any) -> None:
    """Refuse what cannot be served elastically yet.

    Args:
        runner: SGLang's model runner, or what plans the KV cache for it.

    Raises:
        UnsupportedEngineError: With every reason and the setting to change.
    """
    refusal.check_configuration(_obstacles(runner))


def has_two_pools(runner: Any) -> bool:
    """Return whether layers with a sliding window have a pool of their own."""
    return bool(getattr(runner, "is_hybrid_swa", False))


def has_states(runner: Any) -> bool:
    """Return whether layers keep a state for each request, beside keys and values of others."""
    return getattr(runner, "mambaish_config", None) is not None


def model_name(server_args: Any) -> str:
    """Return the last part of the model's name or path."""
    return safe_name(Path(str(server_args.served_model_name or server_args.model_path)).name)


def _obstacles(runner: Any) -> Iterator[str]:
    arguments = runner.server_args
    for name, (allowed, reason) in OBSTACLES.items():
        if getattr(arguments, name, allowed) != allowed:
            yield reason
    if str(runner.device) not in ("cpu", "cuda"):
        yield f"device {runner.device}: only NVIDIA GPUs and CPUs are served"
    if not has_two_pools(runner) and not _fits_one_pool(runner.model_config):
        yield (
            "full and sliding-window layers that may differ in size need two pools; remove "
            f"--disable-hybrid-swa-memory, which is right for {', '.join(sorted(ONE_POOL_MODELS))}"
        )
    if has_two_pools(runner):
        served = ", ".join(sorted(TWO_POOL_BACKENDS))
        for backend in sorted(_attention_backends(arguments) - TWO_POOL_BACKENDS):
            yield (
                f"attention backend {backend}: it reads the window's pool at ids of the other one; "
                f"set --attention-backend to one of {served}, or --disable-hybrid-swa-memory"
            )
    if has_states(runner) and not _has_fixed_states(arguments):
        yield (
            "mamba or linear attention: SGLang would take a share of the device for the states at "
            "once; set --max-mamba-cache-size to how many it shall keep"
        )


def _attention_backends(arguments: Any) -> set[str]:
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    return {value for name in names if (value := getattr(arguments, name, None)) is not None}


def _has_fixed_states(arguments: Any) -> bool:
    if getattr(arguments, "max_mamba_cache_size", None) is not None:
        return True
    return arguments.disable_radix_cache and arguments.max_running_requests is not None


def _fits_one_pool(model_config: Any) -> bool:
    from sglang.srt.configs.model_config import is_hybrid_swa_model

    models = model_config.hf_config.architectures
    known = (models, model_config.hf_text_config)[: len(signature(is_hybrid_swa_model).parameters)]
    return not is_hybrid_swa_model(*known) or not ONE_POOL_MODELS.isdisjoint(models)
