"""What our code uses of SGLang's HiCache: its copies between the device and the host."""

from kvcached_patches.hook import USE, Hook, members, uses

_SRT = "sglang.srt"
_CONTROLLER = f"{_SRT}.managers.cache_controller"
COPIES = (
    *uses(
        "what copies are open, and of what, is read of it (kvcached_sglang/open_copies.py)",
        *members(
            f"{_CONTROLLER}:HiCacheController",
            "write_queue load_queue ack_write_queue ack_load_queue mem_pool_host storage_backend",
        ),
        *members(f"{_CONTROLLER}:CacheOperation", "device_indices host_indices"),
        *members(f"{_CONTROLLER}:HiCacheAck", "finish_event"),
    ),
    *(
        Hook(
            f"{_SRT}.mem_cache.pool_host.{new}",
            "",
            "what the host tier has is counted by it (kvcached_sglang/open_copies.py)",
            alternatives=(f"{_SRT}.mem_cache.memory_pool_host:{name}",),
            how=USE,
            is_optional=True,
        )
        for new, name in (
            ("base:HostKVCache.size_per_token", "HostKVCache.size_per_token"),
            ("group:HostPoolGroup.anchor_entry", "HostPoolGroup.anchor_entry"),
            ("group:HostPoolGroup.entries", "HostPoolGroup.entries"),
        )
    ),
    *uses(
        "what is copied of sliding windows and states is read of it (kvcached_sglang/host_tier.py)",
        *members(f"{_CONTROLLER}:CacheOperation", "pool_transfers"),
        *members(f"{_CONTROLLER}:HiCacheAck", "num_bytes"),
        *members(
            f"{_SRT}.mem_cache.hicache_storage:PoolTransfer",
            "device_indices indices_from_pool name",
        ),
        is_optional=True,
    ),
    *uses(
        "a host tier that is sized by a ratio gets its size by it (kvcached_sglang/host_tier.py)",
        f"{_SRT}.runtime_context:get_memory",
        is_optional=True,
    ),
    *uses(
        "what drafts have in the host tier is counted, too (kvcached_sglang/host_tier.py)",
        *members(f"{_CONTROLLER}:HiCacheController", "has_draft mem_pool_host_draft"),
        is_optional=True,
    ),
    *uses(
        "what the tier on disk has to be faster than is told of it (kvcached_sglang/host_tier.py)",
        f"{_SRT}.mem_cache.hicache_storage:HiCacheFile.file_path",
        *members(f"{_SRT}.managers.schedule_batch:ScheduleBatch", "extend_lens"),
        f"{_SRT}.model_executor.forward_batch_info:ForwardMode.is_extend",
    ),
    *uses(
        "copies are waited for through it, and what they keep in the cache is let go",
        *(
            f"{_SRT}.mem_cache.{cache}.{name}"
            for cache in ("hiradix_cache:HiRadixCache", "unified_radix_cache:UnifiedRadixCache")
            for name in ("writing_check", "loading_check")
        ),
        is_optional=True,
    ),
    *uses(
        "what the host tier has goes first (kvcached_sglang/copied_first.py)",
        f"{_SRT}.mem_cache.base_prefix_cache:EvictResult.num_tokens_evicted",
    ),
    *uses(
        "what the host tier has goes first (kvcached_sglang/copied_first.py)",
        f"{_SRT}.mem_cache.radix_cache:RadixCache.eviction_strategy",
        f"{_SRT}.mem_cache.radix_cache:TreeNode.backuped",
        *members(
            f"{_SRT}.mem_cache.unified_radix_cache:UnifiedRadixCache",
            "is_backuped _evict_device_leaf cache_controller",
        ),
        is_optional=True,
    ),
)
