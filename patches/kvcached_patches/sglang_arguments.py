"""The arguments of a server of SGLang's that our code reads."""

from collections.abc import Iterator

from kvcached_patches.hook import USE, Hook

_SRT = "sglang.srt"


def _arguments(group: str, names: str, *, is_optional: bool = False) -> Iterator[Hook]:
    """Yield arguments of a server; up to 0.5.15 they are in one class, and not in groups."""
    for name in names.split():
        yield Hook(
            f"{_SRT}.arg_groups.fields.{group}.{name}",
            "",
            "a start is sized, or refused by it (kvcached_sglang/obstacles.py)",
            alternatives=(f"{_SRT}.server_args:ServerArgs.{name}",),
            how=USE,
            is_optional=is_optional,
        )


ARGUMENTS = (
    Hook(
        f"{_SRT}.arg_groups.model_override_base:resolved_view",
        "",
        "what SGLang made of the arguments is refused as what the user gave",
        how=USE,
        is_optional=True,
    ),
    *_arguments("device:Device", "device random_seed sleep_on_idle"),
    *_arguments("device:Device", "use_ray", is_optional=True),
    *_arguments("disagg:Disagg", "disaggregation_mode encoder_only"),
    *_arguments("disagg:Disagg", "enable_pdmux", is_optional=True),
    *_arguments("exec_:ExecDllm", "dllm_algorithm"),
    *_arguments("exec_:ExecFeatures", "enable_memory_saver enable_weights_cpu_backup"),
    *_arguments(
        "exec_:ExecFeatures",
        "enable_return_indexer_topk enable_return_routed_experts",
        is_optional=True,
    ),
    *_arguments(
        "exec_:ExecKernel",
        "attention_backend prefill_attention_backend decode_attention_backend",
    ),
    *_arguments(
        "memory:Memory",
        "enable_hierarchical_cache enable_lmcache enable_hisparse",
    ),
    *_arguments(
        "memory:Memory",
        "enable_flexkv enable_unified_memory enable_page_major_kv_layout "
        "enable_unified_cache_external_linker hicache_host_memory_mode radix_cache_backend",
        is_optional=True,
    ),
    *_arguments(
        "memory:Memory",
        "hicache_io_backend hicache_mem_layout hicache_ratio hicache_size hicache_storage_backend",
    ),
    *_arguments("exec_:ExecKernel", "enable_nvidia_megakernel", is_optional=True),
    *_arguments(
        "exec_:ExecMamba",
        "enable_int8_mamba_checkpoint enable_linear_replayssm enable_linear_replayssm_spec",
        is_optional=True,
    ),
    *_arguments("exec_:ExecMoe", "elastic_ep_backend enable_eplb"),
    *_arguments("exec_:ExecMoe", "enable_paged_experts", is_optional=True),
    *_arguments("exec_:ExecOffload", "cpu_offload_gb offload_group_size"),
    *_arguments("exec_:ExecOffload", "ple_offload_embedding", is_optional=True),
    *_arguments("exec_:ExecOverlap", "enable_two_batch_overlap"),
    *_arguments(
        "model:Model",
        "model_path revision download_dir load_format "
        "remote_instance_weight_loader_start_seed_via_transfer_engine",
    ),
    *_arguments("model:Model", "startup_weight_load_mode weight_cache_mode", is_optional=True),
    *_arguments("observability:Observability", "kv_canary", is_optional=True),
    *_arguments("parallel:Parallel", "tp_size pp_size dp_size attn_cp_size nnodes"),
    *_arguments("parallel:Parallel", "enable_dp_attention"),
    *_arguments("parallel:Parallel", "attn_dp_size dcp_size dwdp_size", is_optional=True),
    *_arguments("schedule:Schedule", "max_mamba_cache_size max_prefill_tokens"),
    *_arguments("serving:Serving", "served_model_name"),
    *_arguments("spec:Spec", "speculative_algorithm"),
)
