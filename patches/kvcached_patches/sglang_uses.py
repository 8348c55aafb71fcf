"""What our code uses or overrides of SGLang beside the hooks; a test finds what is missing.

Releases differ in where things are: up to 0.5.12 the allocators are one module and the scheduler is
made of mixins.
"""

from collections.abc import Iterator

from kvcached_patches.hook import OVERRIDE, USE, Hook, members, uses
from kvcached_patches.sglang_arguments import ARGUMENTS
from kvcached_patches.sglang_copies import COPIES
from kvcached_patches.sglang_drafts import DRAFTS
from kvcached_patches.sglang_states import STATES

_SRT = "sglang.srt"
_ALLOCATOR = f"{_SRT}.mem_cache.allocator"
_BATCH = f"{_SRT}.managers.schedule_batch"
_SCHEDULER = f"{_SRT}.managers.scheduler:Scheduler"
_PARTS = f"{_SRT}.managers.scheduler_components"
_CHECKER = f"{_SRT}.managers.scheduler_runtime_checker_mixin:SchedulerRuntimeCheckerMixin"
_PLAN = f"{_SRT}.model_executor.model_runner_kv_cache_mixin:ModelRunnerKVCacheMixin"


def _of_allocator(
    kind: str, module: str, names: str, how: str = USE, *, is_optional: bool = False
) -> Iterator[Hook]:
    """Yield what we lean on of one kind of allocator; up to 0.5.12 all are in one module."""
    for name in names.split():
        yield Hook(
            f"{_ALLOCATOR}.{module}:{kind}.{name}",
            "",
            "our allocators stand in for it, or call it (kvcached_sglang/allocators.py)",
            alternatives=(f"{_ALLOCATOR}:{kind}.{name}",),
            how=how,
            is_optional=is_optional,
        )


_BASE, _TOKEN, _PAGED = (
    "BaseTokenToKVPoolAllocator",
    "TokenToKVPoolAllocator",
    "PagedTokenToKVPoolAllocator",
)

_MEMORY = (
    *_of_allocator(_BASE, "base", "get_kvcache page_size size free_pages"),
    *_of_allocator(_BASE, "base", "available_size merge_and_sort_free size_full", OVERRIDE),
    *_of_allocator(
        _BASE,
        "base",
        "get_all_free_pages resize backup_state restore_state",
        how=OVERRIDE,
        is_optional=True,
    ),
    *_of_allocator(_TOKEN, "token", "available_size alloc clear free", OVERRIDE),
    *_of_allocator(_PAGED, "paged", "alloc alloc_extend alloc_decode clear free", OVERRIDE),
    *_of_allocator(
        _PAGED,
        "paged",
        "available_size merge_and_sort_free get_all_free_pages _release_page_ids",
        how=OVERRIDE,
        is_optional=True,
    ),
    *uses(
        "pools are measured, and laid out in our pages, through it (memory/layer_tensors.py)",
        *members(f"{_SRT}.mem_cache.memory_pool:KVCache", "size page_size"),
        f"{_SRT}.mem_cache.memory_pool:HybridLinearKVPool.full_kv_pool",
        *members(f"{_SRT}.mem_cache.swa_memory_pool:SWAKVPool", "full_kv_pool register_mapping"),
        f"{_SRT}.mem_cache.memory_pool:ReqToTokenPool.req_to_token",
    ),
    *uses(
        "a pool that lies in another way is refused by it",
        f"{_SRT}.mem_cache.memory_pool:MHATokenToKVPool.kv_cache_layout",
        f"{_SRT}.mem_cache.base_swa_memory_pool:BaseSWAKVPool.swa_req_ring_size",
        is_optional=True,
    ),
    Hook(
        f"{_ALLOCATOR}.swa:SWATokenToKVPoolAllocator.full_to_swa_index_mapping",
        "",
        "ids of one pool are mapped to those of the other",
        alternatives=(
            f"{_SRT}.mem_cache.swa_memory_pool:SWATokenToKVPoolAllocator.full_to_swa_index_mapping",
        ),
        how=USE,
    ),
    *uses(
        "what the prefix cache has is read between two steps, and given",
        f"{_SRT}.mem_cache.base_prefix_cache:EvictParams.num_tokens",
        *members(
            f"{_SRT}.mem_cache.base_prefix_cache:BasePrefixCache",
            "evict evictable_size full_evictable_size swa_evictable_size supports_mamba",
            "supports_swa",
        ),
        *members(f"{_SRT}.mem_cache.radix_cache:RadixCache", "evict evictable_size"),
    ),
)

_SCHEDULING = (
    *uses(
        "what requests hold is read between two steps",
        *members(
            f"{_BATCH}:ScheduleBatch",
            "batch_is_full check_decode_mem filter_batch out_cache_loc release_req reqs",
            "req_pool_indices seq_lens tree_cache",
        ),
        *members(f"{_BATCH}:Req", "origin_input_ids output_ids sampling_params"),
        f"{_SRT}.sampling.sampling_params:SamplingParams.max_new_tokens",
        *members(
            _SCHEDULER,
            "_add_request_to_queue _engine_paused chunked_prefill_size chunked_req forward_stream",
            "last_batch req_to_token_pool running_batch server_args token_to_kv_pool_allocator",
            "tree_cache waiting_queue",
        ),
        *members(f"{_SRT}.managers.scheduler_pp_mixin:SchedulerPPMixin", "mbs running_mbs"),
    ),
    *uses(
        "what only some releases have, or have by another name",
        *members(_SCHEDULER, "kv_events_publisher metrics_reporter weight_updater"),
        f"{_PARTS}.kv_events_publisher:SchedulerKvEventsPublisher.publish_kv_events",
        f"{_BATCH}:release_req",
        *members(f"{_BATCH}:Req", "beam_group prefix_len prefix_indices"),
        f"{_SRT}.beam_search.beam_group:BeamGroup.num_member_rows",
        *members(f"{_BATCH}:NextBatchPlan", "batch_to_run running_batch"),
        is_optional=True,
    ),
    Hook(
        f"{_PARTS}.metrics_reporter:SchedulerMetricsReporter.metrics_collector",
        "",
        "gauges show what waits (kvcached_sglang/port.py)",
        alternatives=(
            f"{_SRT}.observability.scheduler_metrics_mixin:SchedulerMetricsMixin.metrics_collector",
        ),
        how=USE,
    ),
    Hook(
        f"{_PARTS}.metrics_reporter:SchedulerMetricsReporter._maybe_log_idle_metrics",
        "",
        "gauges show what waits (kvcached_sglang/port.py)",
        alternatives=(f"{_CHECKER}._maybe_log_idle_metrics",),
        how=USE,
    ),
    *uses(
        "gauges show what waits (kvcached_sglang/port.py)",
        f"{_SRT}.observability.metrics_collector:SchedulerMetricsCollector.last_log_time",
    ),
    *uses("an idle loop polls our bell, too", f"{_SCHEDULER}.idle_sleeper"),
    Hook(
        f"{_PARTS}.idle_sleeper:IdleSleeper.poller",
        "",
        "an idle loop polls our bell, too",
        alternatives=(f"{_SRT}.managers.scheduler:IdleSleeper.poller",),
        how=USE,
    ),
)

_START = (
    *uses(
        "a start is judged by it",
        *members(
            f"{_SRT}.configs.model_config:ModelConfig",
            "context_len dtype hf_config hf_text_config is_generation is_multimodal model_path",
        ),
        f"{_SRT}.configs.model_config:is_hybrid_swa_model",
        f"{_SRT}.distributed.parallel_state:get_attn_tp_group",
        f"{_SRT}.distributed.parallel_state:get_tp_group",
        f"{_SRT}.distributed.parallel_state:get_world_group",
        *members(
            f"{_SRT}.distributed.parallel_state:GroupCoordinator",
            "cpu_group rank_in_group ranks world_size",
        ),
        *members(
            f"{_SRT}.model_executor.model_runner:ModelRunner",
            "device is_hybrid_swa model model_config server_args",
        ),
    ),
    *uses(
        "a rank of data parallelism has a name of its own (kvcached_sglang/engine.py)",
        *members(f"{_SRT}.model_executor.model_runner:ModelRunner", "dp_rank ps"),
        f"{_SRT}.distributed.parallel_state_wrapper:ParallelState.dp_rank",
        f"{_SRT}.runtime_context:get_parallel",
        f"{_SRT}.runtime_context:SpawnRanks.dp_rank",
        is_optional=True,
    ),
    Hook(
        f"{_SRT}.configs.hybrid_arch:mambaish_config",
        "",
        "models that keep states are told from others by it",
        alternatives=(f"{_SRT}.model_executor.model_runner:ModelRunner.mambaish_config",),
        how=USE,
    ),
    Hook(
        f"{_SRT}.mem_cache.kv_cache_configurator:KVCacheConfigurator._handle_max_mamba_cache",
        "",
        "the states of a hybrid model are sized by it",
        alternatives=(f"{_PLAN}.handle_max_mamba_cache",),
        how=USE,
    ),
)

_SLEEP = (
    *uses(
        "a wake is refused through it (kvcached_sglang/sleep_hooks.py)",
        f"{_SRT}.managers.communicator:FanOutCommunicator.__call__",
        f"{_SRT}.managers.tokenizer_control_mixin:TokenizerControlMixin.resume_memory_occupation",
        how=OVERRIDE,
    ),
    *uses(
        "a wake is refused, or told its tags, through it (kvcached_sglang/sleep_hooks.py)",
        f"{_SRT}.managers.io_struct:BaseReq.rid",
        f"{_SRT}.managers.io_struct:ReleaseMemoryOccupationReqInput.tags",
        f"{_SRT}.managers.io_struct:ResumeMemoryOccupationReqInput.tags",
        f"{_SRT}.managers.io_struct:ResumeMemoryOccupationReqOutput",
    ),
    Hook(
        f"{_PARTS}.weight_updater:SchedulerWeightUpdaterManager.offload_tags",
        "",
        "what sleeps is read of it",
        alternatives=(f"{_SCHEDULER}.offload_tags",),
        how=USE,
    ),
    *uses(
        "a health check of a server that sleeps is answered (kvcached_sglang/requests.py)",
        f"{_SRT}.constants:HEALTH_CHECK_RID_PREFIX",
        *members(_SCHEDULER, "maybe_send_health_check_signal return_health_check_ipcs"),
        *members(f"{_BATCH}:Req", "http_worker_ipc rid"),
    ),
)

_REFUSED = "what weights without room are answered (kvcached_sglang/weight_hooks.py)"
_WEIGHTS = (
    Hook(
        f"{_PARTS}.weight_updater:SchedulerWeightUpdaterManager._session",
        "",
        "weights are kept while somebody writes to them, in several calls",
        how=USE,
        is_optional=True,
    ),
    *uses(
        _REFUSED,
        *members(f"{_SRT}.managers.io_struct:GetWeightsByNameReqOutput", "parameter"),
        *members(f"{_SRT}.managers.io_struct:LoRAUpdateOutput", "success error_message"),
        *(
            f"{_SRT}.managers.io_struct:{name}"
            for name in (
                "CheckWeightsReqOutput",
                "SendWeightsToRemoteInstanceReqOutput",
                "UpdateWeightFromDiskReqOutput",
                "UpdateWeightsFromDistributedReqOutput",
                "UpdateWeightsFromIPCReqOutput",
                "UpdateWeightsFromTensorReqOutput",
            )
        ),
    ),
    *uses(
        _REFUSED,
        f"{_SRT}.managers.io_struct:BeginWeightUpdateReqOutput",
        f"{_SRT}.managers.io_struct:EndWeightUpdateReqOutput",
        is_optional=True,
    ),
    *uses(
        "where graphs were captured again, weights stay where they are",
        f"{_SRT}.managers.io_struct:UpdateWeightFromDiskReqInput.recapture_cuda_graph",
        is_optional=True,
    ),
    *uses(
        "graphs are captured in a pool of ours, where there is one for all of them",
        f"{_SRT}.model_executor.runner_utils.pool:set_global_graph_memory_pool",
        *members(f"{_SRT}.model_executor.runner.base_runner:BaseRunner", "model_runner"),
        is_optional=True,
    ),
    *uses(
        "each layer waits for its own weights, where prompts are no captured graphs",
        *members(
            f"{_SRT}.model_executor.model_runner:ModelRunner",
            "eager_runner piecewise_cuda_graph_runner prefill_cuda_graph_runner",
        ),
        is_optional=True,
    ),
    *uses(
        "a model has its weights from a host copy, in the place of its files",
        f"{_SRT}.model_loader.loader:DummyModelLoader",
        f"{_SRT}.model_loader.loader:BaseModelLoader.load_config",
        f"{_SRT}.configs.load_config:LoadConfig.load_format",
        f"{_SRT}.configs.load_config:LoadConfig.model_loader_extra_config",
        f"{_SRT}.model_executor.model_runner:ModelRunner.is_draft_worker",
    ),
    *uses(
        "large buffers go with weights",
        f"{_SRT}.managers.scheduler:Scheduler.tp_worker",
        *members(f"{_SRT}.managers.tp_worker:TpModelWorker", "model_runner"),
        *members(f"{_SRT}.model_executor.model_runner:ModelRunner", "req_to_token_pool"),
    ),
    *uses(
        "weights are taken over, and named by where they come from",
        f"{_SRT}.configs.model_config:ModelConfig.quantization",
    ),
)

USES = (*ARGUMENTS, *_MEMORY, *_SCHEDULING, *COPIES, *DRAFTS, *STATES, *_START, *_SLEEP, *_WEIGHTS)
