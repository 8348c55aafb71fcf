"""What we hook in SGLang. All of it has the same role from 0.5.12.post1 on, in two places."""

from collections.abc import Iterator

from kvcached_patches.hook import Hook
from kvcached_patches.options import Declarations
from kvcached_patches.sglang_uses import USES

PACKAGE = "sglang"
OLDEST_RELEASES = {"sglang": "0.5.12.post1"}
# All are in one class, or in one for each group; no two have the same name.
OPTIONS = Declarations("sglang.srt.server_args", "sglang.srt.arg_groups.fields.", "ServerArgs")

# Where releases up to 0.5.15 plan their KV cache, and what 0.5.12 has in one module or in mixins.
_PLAN = "sglang.srt.model_executor.model_runner_kv_cache_mixin:ModelRunnerKVCacheMixin"
_ALLOCATOR = "sglang.srt.mem_cache.allocator"
_CHECKER = "sglang.srt.managers.scheduler_runtime_checker_mixin:SchedulerRuntimeCheckerMixin"
_WEIGHTS = "sglang.srt.managers.scheduler_update_weights_mixin:SchedulerUpdateWeightsMixin"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"
# HiCache: what begins its copies between device and host.
_CONTROLLER = "sglang.srt.managers.cache_controller:HiCacheController"
_HYBRID_CONTROLLER = (
    "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller:HybridCacheController"
)
_COPIES = (
    ("start_writing", "keep mapped what is copied to the host"),
    ("start_loading", "map what is loaded into before the copy begins"),
)


def _around_weights(
    names: str, owner: str, other: str = "", *, is_optional: bool = False
) -> Iterator[Hook]:
    """Yield hooks on methods that read or write weights beside a batch."""
    for name in names.split():
        yield Hook(
            f"{owner}.{name}",
            "kvcached_sglang.weight_hooks:use_weights",
            "have all weights there first, and look afterwards what was replaced",
            alternatives=(f"{other}.{name}",) if other else (),
            is_optional=is_optional,
        )


# Always there, so that the flag is known before it is parsed; they change nothing without it.
FLAG_HOOKS = (
    Hook(
        "sglang.srt.server_args:ServerArgs.add_cli_args",
        "kvcached_sglang.flags:server_args_add_cli_args",
        "add --enable-kvcached and its companions",
        ("parser",),
    ),
    Hook(
        "sglang.srt.server_args:ServerArgs.from_cli_args",
        "kvcached_sglang.flags:server_args_from_cli_args",
        "when all arguments are known, set our variables, and refuse what cannot be served",
        ("args",),
    ),
)

HOOKS = (
    Hook(
        "sglang.srt.entrypoints.engine:Engine._launch_subprocesses",
        "kvcached_sglang.start_hooks:launch_subprocesses",
        "refuse what arguments alone can tell where there is no command line",
        ("server_args",),
    ),
    Hook(
        "sglang.srt.entrypoints.engine:_wait_for_scheduler_ready",
        "kvcached_sglang.start_hooks:wait_for_scheduler_ready",
        "add no traceback to a message of ours that ends a start",
        ("scheduler_pipe_readers", "scheduler_procs"),
    ),
    Hook(
        "sglang.srt.managers.scheduler:Scheduler.__init__",
        "kvcached_sglang.start_hooks:scheduler_init",
        "let what of ours ends a start be one message",
        ("server_args",),
    ),
    Hook(
        "sglang.srt.model_executor.model_runner:ModelRunner.load_model",
        "kvcached_sglang.start_hooks:load_model",
        "decide whether we serve before anything is loaded or sized",
    ),
    Hook(
        "sglang.srt.model_loader.loader:DefaultModelLoader.load_model",
        "kvcached_sglang.restart_hooks:loader_load_model",
        "have a model's weights from a kept host copy, in the place of its files",
        adr=20,
    ),
    Hook(
        "sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator._profile_available_bytes",
        "kvcached_sglang.start_hooks:profile_available_bytes",
        "the virtual size comes from the limit and the device, never from free memory",
        alternatives=(f"{_PLAN}._profile_available_bytes",),
    ),
    *(
        Hook(
            f"sglang.srt.model_executor.runner.{module}:{name}.capture",
            "kvcached_sglang.start_hooks:capture",
            "let large buffers be ours, where they go with the weights, before graphs have them",
            is_optional=True,
        )
        for module, name in (
            ("decode_cuda_graph_runner", "DecodeCudaGraphRunner"),
            ("prefill_cuda_graph_runner", "PrefillCudaGraphRunner"),
        )
    ),
    Hook(
        "sglang.srt.mem_cache.memory_pool:KVCache.__init__",
        "kvcached_sglang.hooks:kv_cache_init",
        "refuse a pool that cannot lie in our pages before it takes memory",
    ),
    Hook(
        "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool._create_buffers",
        "kvcached_sglang.hooks:create_buffers",
        "put keys and values on our arena",
    ),
    Hook(
        "sglang.srt.mem_cache.memory_pool:MLATokenToKVPool._create_buffers",
        "kvcached_sglang.hooks:create_buffers",
        "put latent keys and values on our arena",
    ),
    Hook(
        "sglang.srt.mem_cache.memory_pool:MHATokenToKVPoolMXFP8._create_buffers",
        "kvcached_sglang.hooks:create_buffers",
        "put keys, values and their scales on our arena",
        is_optional=True,
    ),
    Hook(
        "sglang.srt.mem_cache.memory_pool:DSATokenToKVPool.__init__",
        "kvcached_sglang.index_pool:sparse_attention_init",
        "put latents and the index of sparse attention on our arena",
        ("size", "page_size", "layer_num", "index_buf_size"),
        is_optional=True,
    ),
    Hook(
        "sglang.srt.mem_cache.memory_pool:MambaPool.__init__",
        "kvcached_sglang.state_hooks:mamba_pool_init",
        "put states of mamba, linear attention and convolutions on our arena",
        ("size", "cache_params", "mamba_layer_ids"),
    ),
    Hook(
        "sglang.srt.mem_cache.allocator.mamba:MambaSlotAllocator.__init__",
        "kvcached_sglang.state_hooks:slot_allocator_init",
        "hand out states of open pages only",
        is_optional=True,
    ),
    Hook(
        "sglang.srt.managers.scheduler:Scheduler.get_num_allocatable_reqs",
        "kvcached_sglang.state_hooks:get_num_allocatable_reqs",
        "let no more requests in than there are states for",
    ),
    Hook(
        "sglang.srt.mem_cache.allocator.token:TokenToKVPoolAllocator.__init__",
        "kvcached_sglang.hooks:allocator_init",
        "hand out tokens of open pages only",
        ("kvcache",),
        (f"{_ALLOCATOR}:TokenToKVPoolAllocator.__init__",),
    ),
    Hook(
        "sglang.srt.mem_cache.allocator.paged:PagedTokenToKVPoolAllocator.__init__",
        "kvcached_sglang.hooks:allocator_init",
        "hand out blocks of open pages only",
        ("kvcache",),
        (f"{_ALLOCATOR}:PagedTokenToKVPoolAllocator.__init__",),
    ),
    Hook(
        "sglang.srt.mem_cache.allocator.swa:SWATokenToKVPoolAllocator.__init__",
        "kvcached_sglang.hooks:two_pools_init",
        "map the ids of one pool to those of another over sparse ids",
        ("kvcache",),
        ("sglang.srt.mem_cache.swa_memory_pool:SWATokenToKVPoolAllocator.__init__",),
    ),
    Hook(
        "sglang.srt.managers.scheduler:Scheduler.get_next_batch_to_run",
        "kvcached_sglang.hooks:get_next_batch_to_run",
        "take promises before a schedule, give back what it did not use, and answer neighbours",
    ),
    Hook(
        "sglang.srt.managers.scheduler:Scheduler.get_new_batch_prefill",
        "kvcached_sglang.hooks:get_new_batch_prefill",
        "let a prompt that was begun wait for memory that was taken meanwhile",
    ),
    Hook(
        "sglang.srt.managers.scheduler:Scheduler.process_input_requests",
        "kvcached_sglang.hooks:process_input_requests",
        "answer neighbours while the loop is paused and schedules nothing",
    ),
    Hook(
        "sglang.srt.managers.scheduler:Scheduler.maybe_sleep_on_idle",
        "kvcached_sglang.hooks:maybe_sleep_on_idle",
        "let neighbours end the sleep of an idle loop",
    ),
    Hook(
        "sglang.srt.managers.scheduler:Scheduler.run_batch",
        "kvcached_sglang.hooks:run_batch",
        "with KVCACHED_DEBUG, refuse a batch that names a block which is not mapped",
        ("batch",),
    ),
    Hook(
        "sglang.srt.managers.scheduler:Scheduler.process_batch_result",
        "kvcached_sglang.transfer_hooks:process_batch_result",
        "measure how fast prompts are computed, for the doctor of tiers on disk",
        ("batch",),
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.pool_stats_observer:"
        "SchedulerPoolStatsObserver.get_pool_stats",
        "kvcached_sglang.hooks:get_pool_stats",
        "let SGLang's leak checks add up to the virtual size",
        alternatives=(f"{_CHECKER}.get_pool_stats",),
    ),
    Hook(
        "sglang.srt.managers.schedule_batch:ScheduleBatch.retract_decode",
        "kvcached_sglang.hooks:retract_decode",
        "let the last request wait for a neighbour's memory instead of aborting it",
    ),
    *(
        Hook(
            f"{_CONTROLLER}.{name}",
            f"kvcached_sglang.transfer_hooks:{name}",
            why,
        )
        for name, why in _COPIES
    ),
    *(  # up to 0.5.17 a class that SGLang has for layers of several kinds has its own
        Hook(
            f"{_HYBRID_CONTROLLER}.{name}",
            f"kvcached_sglang.transfer_hooks:{name}",
            why,
            is_optional=True,
        )
        for name, why in _COPIES
    ),
    Hook(
        f"{_CONTROLLER}.reset",
        "kvcached_sglang.transfer_hooks:controller_reset",
        "let no copy be open that is forgotten",
    ),
    Hook(
        "sglang.srt.managers.scheduler:Scheduler.flush_cache",
        "kvcached_sglang.transfer_hooks:flush_cache",
        "let a flush wait for copies, in the place of refusing it",
    ),
    Hook(
        f"{_UPDATER}.release_memory_occupation",
        "kvcached_sglang.sleep_hooks:release_memory_occupation",
        "give all pages but page 0 back",
        ("recv_req",),
        (f"{_WEIGHTS}.release_memory_occupation",),
    ),
    Hook(
        f"{_UPDATER}.resume_memory_occupation",
        "kvcached_sglang.sleep_hooks:resume_memory_occupation",
        "make room for what comes back from sleep, or refuse before anything is touched",
        ("recv_req",),
        (f"{_WEIGHTS}.resume_memory_occupation",),
    ),
    *_around_weights(
        "check_weights get_weights_by_name save_remote_model save_sharded_model "
        "update_weights_from_disk update_weights_from_distributed update_weights_from_ipc "
        "update_weights_from_tensor",
        _UPDATER,
        _WEIGHTS,
    ),
    *_around_weights("begin_weight_update end_weight_update", _UPDATER, is_optional=True),
    *_around_weights(
        "load_lora_adapter load_lora_adapter_from_tensors send_weights_to_remote_instance",
        "sglang.srt.managers.scheduler:Scheduler",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin.init_communicators",
        "kvcached_sglang.sleep_hooks:init_communicators",
        "let a refused wake be an error of its caller",
    ),
    Hook(
        "sglang.srt.utils.torch_memory_saver_adapter:_TorchMemorySaverAdapterReal.region",
        "kvcached_sglang.sleep_hooks:saver_region",
        "count what the memory saver holds, by tag",
        ("tag",),
    ),
    Hook(
        "sglang.srt.utils.torch_memory_saver_adapter:_TorchMemorySaverAdapterReal.cuda_graph",
        "kvcached_sglang.sleep_hooks:saver_region",
        "count what captured graphs hold in the memory saver",
    ),
)

ALL_HOOKS = (*FLAG_HOOKS, *HOOKS)
LOCKED = (*ALL_HOOKS, *USES)
