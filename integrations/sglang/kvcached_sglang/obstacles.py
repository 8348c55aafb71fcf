"""What of SGLang cannot be served elastically yet, each with the setting to change."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from inspect import signature
from typing import Any

from kvcached_sglang.host_tier import has_tier_of_pools, is_offloading, tier_obstacles
from kvcached_sglang.parallel import (
    ONE_ATTENTION_RANK,
    has_stages,
    num_attention_ranks,
    parallel_obstacles,
)
from kvcached_sglang.speculating import REMOVE, algorithm_of, draft_obstacles, has_draft_model

# What a server of these settings would do with KV memory is not ours to lay out.
OBSTACLES = {
    "dwdp_size": (1, "distributed weights: nobody has tried it; set --dwdp-size 1"),
    "dcp_size": (1, "decode context parallelism: not served yet; set --dcp-size 1"),
    "attn_cp_size": (1, "context parallelism: not served yet; set --attn-cp-size 1"),
    "nnodes": (1, "several nodes: the ledger is one machine's; set --nnodes 1"),
    "disaggregation_mode": (
        "null",
        "disaggregation: a transfer engine holds KV addresses; set --disaggregation-mode null",
    ),
    "enable_lmcache": (False, "LMCache: it holds KV addresses; remove --enable-lmcache"),
    "enable_flexkv": (False, "FlexKV: it holds KV addresses; remove --enable-flexkv"),
    "enable_pdmux": (
        False,
        "PD multiplexing: its loop takes no promise before a schedule; remove --enable-pdmux",
    ),
    "enable_unified_cache_external_linker": (
        False,
        "a cache linker: it holds KV addresses; remove --enable-unified-cache-external-linker",
    ),
    "enable_hisparse": (False, "HiSparse: it has pools of its own; remove --enable-hisparse"),
    "enable_unified_memory": (
        False,
        "unified memory: sub-pools share one region already; remove --enable-unified-memory",
    ),
    "enable_page_major_kv_layout": (
        False,
        "a block's layers lie side by side; remove --enable-page-major-kv-layout",
    ),
    "radix_cache_backend": (
        None,
        "a prefix cache of another package: it may hold KV addresses; remove --radix-cache-backend",
    ),
    "enable_return_routed_experts": (
        False,
        "routed experts: kept by ids, and ours go beyond; remove --enable-return-routed-experts",
    ),
    "enable_return_indexer_topk": (
        False,
        "indexers' choices: kept by ids, and ours go beyond; remove --enable-return-indexer-topk",
    ),
    "use_ray": (
        False,
        "Ray's actors load no plugin, and would serve without kvcached; remove --use-ray",
    ),
    "dllm_algorithm": (None, "diffusion models: not served yet; remove --dllm-algorithm"),
    "kv_canary": (
        "none",
        "KV canaries: they take memory for each id, and we make more; set --kv-canary none",
    ),
}
DEVICES = ("cpu", "cuda")

# One of releases (0.5.19 on) whose record of arguments stays as the user gave it.
_RESOLVING_MODULE = "sglang.srt.arg_groups.model_override_base"

# With it SGLang puts memory under the addresses of its pool itself, when graphs are captured. It
# sets it by itself for one model, unless it is set.
LATE_SIZE = "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"
YES = ("true", "1", "yes", "y")

# What keeps addresses of weights, or moves weights by itself: they stay, the KV cache is elastic.
WEIGHT_OBSTACLES = {
    "pp_size": (1, "stages would wait for each other; set --pp-size 1"),
    "enable_eplb": (False, "experts are moved between ranks; remove --enable-eplb"),
    "cpu_offload_gb": (0, "SGLang offloads layers itself; remove --cpu-offload-gb"),
    "offload_group_size": (-1, "SGLang offloads layers itself; remove --offload-group-size"),
    "enable_paged_experts": (
        False,
        "SGLang copies experts to their addresses itself; remove --enable-paged-experts",
    ),
    "ple_offload_embedding": (
        None,
        "embeddings are read by their addresses; set --no-ple-offload-embedding",
    ),
    "weight_cache_mode": ("off", "a daemon has the weights; set --weight-cache-mode off"),
    "startup_weight_load_mode": (
        "serial",
        "weights come when all is captured; set --startup-weight-load-mode serial",
    ),
    "remote_instance_weight_loader_start_seed_via_transfer_engine": (
        False,
        "a transfer engine holds addresses of weights; do not start a seed by it",
    ),
    "enable_nvidia_megakernel": (
        False,
        "a megakernel holds addresses of weights; remove --enable-nvidia-megakernel",
    ),
    "enable_weights_cpu_backup": (
        False,
        "SGLang's memory saver copies weights itself; remove --enable-weights-cpu-backup",
    ),
}
# Formats whose weights lie in memory of others, or are moved by what loads them.
SHARED_FORMATS = frozenset({"expert_pack", "ipc_cache", "rdma", "remote_instance"})

# Mixes of full and sliding-window layers, all of one size: they are right in one pool, too.
ONE_POOL_MODELS = frozenset(
    {
        "GptOssForCausalLM",
        "LagunaForCausalLM",
        "Llama4ForConditionalGeneration",
        "MellumForCausalLM",
    }
)

# What gives states a pool of SGLang's own.
FIXED_STATES = "--max-mamba-cache-size to how many SGLang shall keep at once"

# What SGLang keeps for each slot beside its state.
BESIDE_STATES = (
    "enable_linear_replayssm",
    "enable_linear_replayssm_spec",
    "enable_int8_mamba_checkpoint",
)

# Attention that reads the window's pool at ids of that pool. SGLang's others read it at ids of the
# other one: right as long as both hand out the same ones, which ours never do.
TWO_POOL_BACKENDS = frozenset({"fa3", "fa4", "flashinfer", "triton", "trtllm_mha"})


def resolved(arguments: Any) -> Any:
    """Return a server's arguments as SGLang resolved them, as far as it has.

    Args:
        arguments: What was parsed, or a `ServerArgs`.
    """
    if find_spec(_RESOLVING_MODULE) is None:
        return arguments
    from sglang.srt.arg_groups.model_override_base import resolved_view

    return resolved_view(arguments)


def argument_obstacles(arguments: Any) -> Iterator[str]:
    """Yield why a server of these arguments cannot be served, and what to change.

    Args:
        arguments: What was parsed, or a `ServerArgs`.
    """
    arguments = resolved(arguments)
    for name, (allowed, reason) in OBSTACLES.items():
        if getattr(arguments, name, allowed) != allowed:
            yield reason
    yield from parallel_obstacles(arguments)
    yield from tier_obstacles(arguments)
    yield from draft_obstacles(arguments)
    device = getattr(arguments, "device", None)
    if device is not None and device.partition(":")[0] not in DEVICES:
        yield f"device {device}: only NVIDIA GPUs and CPUs are served"


def weight_obstacles(arguments: Any) -> Iterator[str]:
    """Yield why the weights of a server stay, though its KV cache is elastic.

    Args:
        arguments: A `ServerArgs`.
    """
    arguments = resolved(arguments)
    for name, (allowed, reason) in WEIGHT_OBSTACLES.items():
        if (getattr(arguments, name, None) or allowed) != allowed:
            yield reason
    if num_attention_ranks(arguments) > 1:
        yield f"ranks compute each step together, an idle one too; {ONE_ATTENTION_RANK}"
    if has_draft_model(arguments):
        yield f"a draft's weights stay, and read the target's; {REMOVE}"
    if arguments.load_format in SHARED_FORMATS:
        yield f"something else has the weights; remove --load-format {arguments.load_format}"


def model_obstacles(runner: Any) -> Iterator[str]:
    """Yield what only a model's configuration can tell.

    Args:
        runner: SGLang's model runner, or what plans the KV cache for it.
    """
    arguments = resolved(runner.server_args)
    if str(runner.device) not in DEVICES:
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
    late = os.environ.get(LATE_SIZE, "")
    if late.lower() in YES and str(runner.device) != "cpu":
        yield f"{LATE_SIZE}={late}: the pool's memory would be SGLang's own; set it to 0"
    for what, remedy in _untried_beside(runner):
        yield f"{what} of a model with sliding windows or states: nobody has tried it; {remedy}"
    if has_elastic_states(runner):
        for reason in _state_obstacles(runner):
            yield f"states of mamba or linear attention: {reason}; set {FIXED_STATES}"


def _untried_beside(runner: Any) -> Iterator[tuple[str, str]]:
    """Yield what nobody has tried with a second pool, and what to change."""
    arguments = runner.server_args
    if not (has_two_pools(runner) or has_states(runner)):
        return
    if is_offloading(arguments) and not has_tier_of_pools():
        yield "HiCache", "install SGLang 0.5.18 or newer, or remove --enable-hierarchical-cache"
    if has_stages(arguments):
        yield "pipeline parallelism", "set --pp-size 1"
    if num_attention_ranks(arguments) > 1:
        yield "data-parallel attention", ONE_ATTENTION_RANK
    if has_two_pools(runner) and algorithm_of(arguments) is not None:
        yield "speculative decoding", REMOVE


def has_two_pools(runner: Any) -> bool:
    """Return whether layers with a sliding window have a pool of their own."""
    return bool(getattr(runner, "is_hybrid_swa", False))


def states_config(runner: Any) -> Any:
    """Return what a model says of layers that keep a state for each request; None without any."""
    if hasattr(runner, "mambaish_config"):
        return runner.mambaish_config
    from sglang.srt.configs.hybrid_arch import mambaish_config  # not the runner's from 0.5.16 on

    return mambaish_config(runner.model_config)


def has_states(runner: Any) -> bool:
    """Return whether layers keep a state for each request, beside keys and values of others."""
    return states_config(runner) is not None


def has_elastic_states(runner: Any) -> bool:
    """Return whether these states are elastic; otherwise SGLang keeps a pool of a fixed size."""
    return has_states(runner) and runner.server_args.max_mamba_cache_size is None


def _state_obstacles(runner: Any) -> Iterator[str]:
    if find_spec("sglang.srt.mem_cache.allocator.mamba") is None:
        yield "this release of SGLang hands them out in another way"
    if has_two_pools(runner):
        yield "beside sliding windows in a pool of their own nobody has tried them"
    if getattr(states_config(runner), "short_conv_layer_ids", None):
        yield "what this model keeps beside them is found by the same numbers"
    for name in BESIDE_STATES:
        if getattr(runner.server_args, name, False):
            flag = "--" + name.replace("_", "-")
            yield f"what SGLang keeps beside them is found by the same numbers (remove {flag})"


def _attention_backends(arguments: Any) -> set[str]:
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    return {value for name in names if (value := getattr(arguments, name, None)) is not None}


def _fits_one_pool(model_config: Any) -> bool:
    from sglang.srt.configs.model_config import is_hybrid_swa_model

    models = model_config.hf_config.architectures
    known = (models, model_config.hf_text_config)[: len(signature(is_hybrid_swa_model).parameters)]
    return not is_hybrid_swa_model(*known) or not ONE_POOL_MODELS.isdisjoint(models)
