"""What our code uses of SGLang's speculative decoding: its draft models, and what a step takes."""

from kvcached_patches.hook import members, uses

_SRT = "sglang.srt"
_BATCH = f"{_SRT}.managers.schedule_batch"
_RUNNER = f"{_SRT}.model_executor.model_runner:ModelRunner"
_LAYERS = f"{_SRT}.model_executor.model_runner_components.layer_setup:ModelLayerInfo"
_MODEL = f"{_SRT}.configs.model_config:ModelConfig"

DRAFTS = (
    *uses(
        "what a step of drafts takes is promised (kvcached_sglang/speculating.py)",
        *members(f"{_BATCH}:ScheduleBatch", "forward_mode new_tokens_required_next_decode"),
        *members(f"{_BATCH}:ScheduleBatch", "spec_algorithm"),
        f"{_SRT}.model_executor.forward_batch_info:ForwardMode.is_decode",
        f"{_SRT}.speculative.spec_info:SpeculativeAlgorithm.is_none",
    ),
    *uses(
        "what drafts may write is looked up (kvcached_sglang/speculating.py)",
        *members(f"{_BATCH}:Req", "kv kv_allocated_len"),
        f"{_BATCH}:ReqKvInfo.kv_allocated_len",
        is_optional=True,
    ),
    *uses(
        "the layers of a draft are counted (kvcached_sglang/drafts.py)",
        f"{_SRT}.mem_cache.memory_pool:KVCache.layer_num",
    ),
    *uses(
        "the layers of a draft are counted (kvcached_sglang/drafts.py)",
        f"{_RUNNER}.layer_info",
        f"{_RUNNER}.num_effective_layers",
        f"{_LAYERS}.num_effective_layers",
        is_optional=True,
    ),
    *uses(
        "what a draft's keys of a token take is computed (kvcached_sglang/drafts.py)",
        *members(_MODEL, "attention_arch get_num_kv_heads head_dim"),
        f"{_RUNNER}.kv_cache_dtype",
    ),
    *uses(
        "a pool whose tokens lie inside heads is told its pages (kvcached_sglang/pools.py)",
        f"{_SRT}.mem_cache.memory_pool:MHATokenToKVPool.use_hnd",
        is_optional=True,
    ),
)
