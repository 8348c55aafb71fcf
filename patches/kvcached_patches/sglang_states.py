"""What our code uses of SGLang's states: of mamba, linear attention and short convolutions."""

from kvcached_patches.hook import OVERRIDE, USE, Hook, members, uses

_SRT = "sglang.srt"
_SLOTS = f"{_SRT}.mem_cache.allocator.mamba:MambaSlotAllocator"
_SIZES = f"{_SRT}.configs.mamba_utils"
_PLAN = f"{_SRT}.model_executor.model_runner_kv_cache_mixin:ModelRunnerKVCacheMixin"

STATES = (
    *uses(
        "our allocator of states stands in for it, or calls it (kvcached_sglang/slots.py)",
        *members(_SLOTS, "alloc alloc_group_begin alloc_group_end available_size clear free"),
        *members(_SLOTS, "schedulable_available_size _do_alloc"),
        how=OVERRIDE,
        is_optional=True,
    ),
    *uses(
        "our allocator of states stands in for it (kvcached_sglang/slots.py)",
        *members(_SLOTS, "free_slots size"),
        is_optional=True,
    ),
    *uses(
        "states are placed by what it says (kvcached_sglang/states.py)",
        *members(f"{_SIZES}:BaseLinearStateParams", "dtype mamba_cache_per_req"),
        f"{_SIZES}:Mamba2CacheParams.shape",
        *members(f"{_SIZES}:Mamba2StateShape", "conv temporal"),
        *members(f"{_SIZES}:Mamba2StateDType", "conv temporal"),
    ),
    *uses(
        "a model that keeps more by the same numbers is refused (kvcached_sglang/obstacles.py)",
        f"{_SRT}.configs.qwen4_exp:Qwen4ExpTextConfig.short_conv_layer_ids",
        is_optional=True,
    ),
    *uses(
        "SGLang is told how many states there may be (kvcached_sglang/states.py)",
        f"{_SRT}.runtime_context:get_context",
        f"{_SRT}.runtime_context:RuntimeContext.override",
        is_optional=True,
    ),
    Hook(
        f"{_SRT}.mem_cache.kv_cache_configurator:KVCacheConfigurator._calculate_mamba_ratio",
        "",
        "so many states are kept for each request (kvcached_sglang/states.py)",
        alternatives=(f"{_PLAN}._calculate_mamba_ratio",),
        how=USE,
    ),
    *uses(
        "cached states are counted, and given (kvcached_sglang/states.py)",
        f"{_SRT}.mem_cache.base_prefix_cache:EvictParams.mamba_num",
    ),
    Hook(
        f"{_SRT}.mem_cache.unified_radix_cache:UnifiedRadixCache.mamba_evictable_size",
        "",
        "cached states are counted (kvcached_sglang/states.py)",
        alternatives=(f"{_SRT}.mem_cache.mamba_radix_cache:MambaRadixCache.mamba_evictable_size",),
        how=USE,
    ),
    *uses(
        "states of batches and requests are counted (kvcached_sglang/states.py)",
        f"{_SRT}.mem_cache.memory_pool:HybridReqToTokenPool.get_mamba_indices",
        f"{_SRT}.managers.scheduler:Scheduler.max_running_requests",
    ),
)
