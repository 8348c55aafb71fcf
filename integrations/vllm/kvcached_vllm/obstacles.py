"""What of vLLM cannot be served elastically yet, each with the setting to change."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from kvcached_vllm.connectors import connector_obstacles

# vLLM's own variable for how a KV cache lies in memory: L for layers, B for blocks.
LAYOUT = "VLLM_KV_CACHE_LAYOUT"

# What of newer releases tunes FlashInfer's kernel for states that are replayed.
_TUNING_MODULE = "vllm.model_executor.warmup.replayssm_warmup"


def can_serve(vllm_config: Any) -> bool:
    """Return whether this configuration is served elastically."""
    return not any(obstacles(vllm_config))


def obstacles(vllm_config: Any) -> Iterator[str]:
    """Yield why this configuration cannot be served, and the setting to change."""
    from vllm.platforms import current_platform

    device = vllm_config.device_config.device_type
    device = "rocm" if device == "cuda" and current_platform.is_rocm() else device
    parallel = vllm_config.parallel_config
    if device not in ("cpu", "cuda"):
        yield f"device {device}: only NVIDIA GPUs and CPUs are served"
    backend = getattr(parallel, "data_parallel_backend", "mp")
    if backend != "mp":
        yield f"data parallel backend {backend}: set --data-parallel-backend mp"
    if getattr(parallel, "enable_elastic_ep", False):
        yield "elastic expert parallelism: ranks come and go; remove --enable-elastic-ep"
    if getattr(parallel, "enable_fault_tolerance", False):
        yield (
            "fault tolerance: vLLM goes on after a step that failed, and nobody knows what of it "
            "was mapped; remove --enable-fault-tolerance and --fault-tolerance-config"
        )
    num_parts = getattr(parallel, "decode_context_parallel_size", 1)
    if num_parts != 1:
        yield (
            f"decode context parallelism of {num_parts} ranks: vLLM makes up blocks that it reads "
            "while it captures graphs; set --decode-context-parallel-size 1"
        )
    if getattr(parallel, "enable_dbo", False):
        yield "dual batch overlap: nobody has tried its two threads; remove --enable-dbo"
    if getattr(parallel, "nnodes", 1) != 1:
        yield f"{parallel.nnodes} nodes: the ledger is one machine's; set --nnodes 1"
    backend = parallel.distributed_executor_backend
    if backend not in (None, "mp", "uni") and not isinstance(backend, type):
        yield f"executor {backend}: set --distributed-executor-backend mp"
    yield from connector_obstacles(vllm_config.kv_transfer_config)
    yield from _layout_obstacles()
    yield from _block_obstacles(vllm_config)


def _block_obstacles(vllm_config: Any) -> Iterator[str]:
    """Yield what has blocks of its own, or counts or reads those that are not there."""
    attention = getattr(vllm_config, "attention_config", None)
    if getattr(attention, "hisparse_config", None) is not None:
        yield (
            "HiSparse: it has block pools of its own; remove hisparse_config from "
            "--attention-config"
        )
    own = getattr(vllm_config, "aux_output_config", None)  # the model's up to 0.30
    owner = own or getattr(vllm_config, "model_config", None)
    if getattr(owner, "enable_return_routed_experts", False):
        yield (
            "routed experts: vLLM sizes what it keeps of them by its number of blocks, which is "
            "another one here; remove --enable-return-routed-experts"
        )
    if getattr(vllm_config.speculative_config, "enable_adaptive_verification", False):
        yield (
            "adaptive verification: to measure a step it reads blocks that nobody has; set "
            "enable_adaptive_verification to false in --speculative-config"
        )
    if _tunes_replayed_states(vllm_config):
        yield (
            "ReplaySSM by FlashInfer: to tune it vLLM uses states of blocks that nobody has; set "
            "enable_flashinfer_autotune to false in --kernel-config"
        )


def _tunes_replayed_states(vllm_config: Any) -> bool:
    if not getattr(getattr(vllm_config, "cache_config", None), "use_replayssm", False):
        return False
    is_by_flashinfer = vllm_config.mamba_config.backend.name == "FLASHINFER"
    is_tuned = vllm_config.kernel_config.enable_flashinfer_autotune is not False
    return is_by_flashinfer and is_tuned and find_spec(_TUNING_MODULE) is not None


def _layout_obstacles() -> Iterator[str]:
    layout = os.environ.get(LAYOUT)
    if layout and len(layout) == len("LBNHC") and not layout.startswith(("LB", "B")):  # from 0.29
        yield f"{LAYOUT}={layout}: a layer's block has to be in one piece; unset it, or set LBNHC"


def layer_obstacle(error: Exception | str, vllm_config: Any) -> str:
    """Return why planes cannot be laid out; with a draft its layers may be the ones that differ."""
    if not _has_draft(vllm_config):
        return str(error)
    return (
        f"{error}; with --speculative-config the draft's layers have to fit the model's, too: take "
        "a draft with as many KV heads of the same size, or an EAGLE or MTP head that has them, or "
        "method ngram"
    )


def _has_draft(vllm_config: Any) -> bool:
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    return draft is not None and draft is not vllm_config.model_config  # as it is for ngrams
