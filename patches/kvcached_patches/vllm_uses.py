"""What our code uses or overrides of vLLM beside the hooks; a test finds what is missing."""

from kvcached_patches.hook import OVERRIDE, members, uses

_CORE = "vllm.v1.core"
_POOL = f"{_CORE}.block_pool:BlockPool"

_BLOCKS = (
    *uses(
        "our block pool stands in for it, or puts something else where it looks",
        *members(_POOL, "__init__ get_new_blocks free_blocks touch reset_prefix_cache"),
        *members(_POOL, "get_num_free_blocks get_usage evict_blocks"),
        how=OVERRIDE,
    ),
    *uses(
        "the same, in some releases",
        f"{_POOL}.unpin_blocks",
        how=OVERRIDE,
        is_optional=True,
    ),
    *uses(
        "our block pool calls it, or reads it",
        *members(_POOL, "_maybe_evict_cached_block blocks num_gpu_blocks enable_caching"),
        *members(_POOL, "free_block_queue metrics_collector null_block"),
        *members(
            f"{_CORE}.kv_cache_utils:FreeKVCacheBlockQueue",
            "__init__ remove append_n prepend_n popleft_n get_all_free_blocks",
            "fake_free_list_head",
        ),
        *members(
            f"{_CORE}.kv_cache_utils:KVCacheBlock",
            "block_id ref_cnt block_hash is_null prev_free_block next_free_block",
        ),
        *members(
            f"{_CORE}.kv_cache_metrics:KVCacheMetricsCollector",
            "on_block_accessed on_block_allocated on_block_evicted",
        ),
    ),
)

_SCHEDULING = (
    *uses(
        "the engine looks at it between steps, and is woken through it",
        f"{_CORE}.sched.interface:SchedulerInterface.has_unfinished_requests",
        *members(
            f"{_CORE}.sched.scheduler:Scheduler",
            "get_request_counts kv_cache_manager kv_event_publisher",
        ),
        *members(
            f"{_CORE}.kv_cache_manager:KVCacheManager",
            "take_events block_pool coordinator",
        ),
        f"{_CORE}.single_type_kv_cache_manager:SingleTypeKVCacheManager.block_pool",
        f"{_CORE}.kv_cache_coordinator:KVCacheCoordinator.get_num_blocks_to_allocate",
        *members("vllm.v1.request:Request", "status num_computed_tokens"),
        *members("vllm.v1.request:RequestStatus", "WAITING PREEMPTED"),
        "vllm.distributed.kv_events:KVEventBatch",
        "vllm.distributed.kv_events:EventBatch.ts",
        "vllm.distributed.kv_events:KVEventBatch.events",
        "vllm.distributed.kv_events:EventPublisher.publish",
        "vllm.v1.engine.core:EngineCoreProc.input_queue",
        *members(
            "vllm.v1.engine.core:EngineCore", "_idle_state_callbacks model_executor scheduler"
        ),
        "vllm.v1.engine:EngineCoreRequestType.WAKEUP",
        "vllm.v1.executor.abstract:Executor.collective_rpc",
    ),
    *uses(
        "a step's new blocks are checked, or mapped while vLLM warms up",
        *members(
            f"{_CORE}.sched.output:SchedulerOutput", "scheduled_new_reqs scheduled_cached_reqs"
        ),
        f"{_CORE}.sched.output:NewRequestData.block_ids",
        f"{_CORE}.sched.output:CachedRequestData.new_block_ids",
    ),
    *uses(
        "memory that has to stay free for what runs, from 0.24 on",
        f"{_CORE}.kv_cache_manager:KVCacheManager.watermark_blocks",
        is_optional=True,
    ),
)

_PLAN = "vllm.v1.kv_cache_interface"

_LAYOUT = (
    *uses(
        "the plan of the KV cache is read and rewritten (kvcached_vllm/layout.py)",
        f"{_PLAN}:KVCacheTensor.size",
        *members(f"{_PLAN}:KVCacheConfig", "num_blocks kv_cache_tensors kv_cache_groups"),
        f"{_PLAN}:KVCacheGroupSpec.kv_cache_spec",
        *members(f"{_PLAN}:KVCacheSpec", "block_size page_size_bytes max_memory_usage_bytes"),
    ),
    *uses(
        "it shows which of two shapes a plan has: a tensor for each layer, or one for all",
        *members(f"{_PLAN}:KVCacheTensor", "block_stride layer_stride layers offset"),
        is_optional=True,
    ),
)

_TRITON = "vllm.v1.attention.backends.triton_attn"

_SCALES = uses(
    "views of the scales beside each token's head (kvcached_vllm/inline_scales.py)",
    *members(f"{_TRITON}:TritonAttentionImpl", "_k_scale_cache _v_scale_cache"),
    "vllm.model_executor.layers.attention.attention:Attention.impl",
)

_SLEEP = (
    *uses(
        "what a wake allocates is read from it, and taken back (kvcached_vllm/sleeping.py)",
        *members("vllm.device_allocator.cumem:CuMemAllocator", "instance pointer_to_data"),
        "vllm.device_allocator.cumem:create_and_map",
        "vllm.device_allocator.cumem:unmap_and_release",
        *members("vllm.device_allocator:AllocationData", "cpu_backup_tensor handle tag"),
        "vllm.v1.executor.abstract:Executor.is_sleeping",
    ),
    *uses(
        "a wake allocates through what we put in the place of create_and_map",
        "vllm.device_allocator.cumem:CuMemAllocator.wake_up",
        how=OVERRIDE,
    ),
    *uses(
        "what a wake may leave asleep, and whether a part of it is awake",
        "vllm.device_allocator:DEFERRABLE_TAGS",
        "vllm.device_allocator:AllocationData.is_asleep",
        is_optional=True,
    ),
    *uses(
        "a wake zeroes the whole of a quantised KV cache through it, up to 0.28",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.init_fp8_kv_scales",
        is_optional=True,
    ),
    *uses(
        "the same: there is nothing to zero while it is taken away",
        "vllm.v1.worker.gpu_worker:Worker.model_runner",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.kv_caches",
    ),
)

_CONFIG = "vllm.config"
_LOADER = "vllm.model_executor.model_loader"

_START = (
    *uses(
        "a worker is sized and refused by it",
        *members(
            "vllm.v1.worker.worker_base:WorkerBase",
            "device vllm_config cache_config parallel_config",
        ),
        "vllm.v1.worker.worker_base:WorkerWrapperBase.worker",
        *members("vllm.utils.mem_utils:MemorySnapshot", "free_memory total_memory"),
        "vllm.platforms:current_platform",
        "vllm.platforms.interface:Platform.is_rocm",
        *members(
            f"{_CONFIG}.vllm:VllmConfig",
            "attention_config cache_config device_config kv_transfer_config load_config",
            "model_config parallel_config speculative_config",
        ),
        *members(
            f"{_CONFIG}.cache:CacheConfig",
            "gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks",
        ),
        f"{_CONFIG}.device:DeviceConfig.device_type",
        f"{_CONFIG}.load:LoadConfig.download_dir",
        *members(f"{_CONFIG}.model:ModelConfig", "dtype hf_config is_multimodal_model model"),
        *members(f"{_CONFIG}.model:ModelConfig", "enable_prompt_embeds revision runner_type"),
        *members(
            f"{_CONFIG}.parallel:ParallelConfig",
            "data_parallel_backend data_parallel_index data_parallel_size",
            "decode_context_parallel_size distributed_executor_backend",
            "enable_dbo nnodes pipeline_parallel_size tensor_parallel_size world_size",
        ),
        *members(
            f"{_CONFIG}.speculative:SpeculativeConfig",
            "draft_model_config draft_tensor_parallel_size",
        ),
    ),
    *uses(
        "ranks that come and go are refused",
        f"{_CONFIG}.parallel:ParallelConfig.enable_elastic_ep",
        is_optional=True,
    ),
    *uses(
        "an idle rank's step reads the null block alone, in either model runner",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.input_batch",
        "vllm.v1.worker.gpu_input_batch:InputBatch.block_table",
        "vllm.v1.worker.block_table:MultiGroupBlockTable.block_tables",
        "vllm.v1.worker.block_table:BlockTable.block_table",
        "vllm.v1.utils:CpuGpuBuffer.gpu",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.block_tables",
        "vllm.v1.worker.gpu.block_table:BlockTables.input_block_tables",
    ),
    *uses(
        "what tiers on disk did (kvcached_vllm/open_copies.py)",
        "vllm.v1.engine:EngineCoreOutputs.scheduler_stats",
        "vllm.v1.metrics.stats:SchedulerStats.kv_connector_stats",
    ),
    *uses(
        "to measure a step vLLM reads blocks that nobody has",
        f"{_CONFIG}.speculative:SpeculativeConfig.enable_adaptive_verification",
        is_optional=True,
    ),
    *uses(
        "routed experts are refused, wherever a release has the setting",
        f"{_CONFIG}.vllm:VllmConfig.aux_output_config",
        f"{_CONFIG}.aux_output:AuxOutputConfig.enable_return_routed_experts",
        f"{_CONFIG}.model:ModelConfig.enable_return_routed_experts",
        is_optional=True,
    ),
    *uses(
        "after a step that failed vLLM goes on",
        f"{_CONFIG}.parallel:ParallelConfig.enable_fault_tolerance",
        is_optional=True,
    ),
    *uses(
        "to tune FlashInfer's kernel for replayed states vLLM uses blocks that nobody has",
        f"{_CONFIG}.cache:CacheConfig.use_replayssm",
        f"{_CONFIG}.kernel:KernelConfig.enable_flashinfer_autotune",
        f"{_CONFIG}.mamba:MambaConfig.backend",
        *members(f"{_CONFIG}.vllm:VllmConfig", "kernel_config mamba_config"),
        is_optional=True,
    ),
    *uses(
        "HiSparse has block pools of its own, from 0.30 on",
        f"{_CONFIG}.attention:AttentionConfig.hisparse_config",
        is_optional=True,
    ),
)

_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")

_WEIGHTS = (
    *uses(
        "weights are loaded without vLLM's own allocator, and without kernels that hide them",
        "vllm.v1.worker.gpu_worker:Worker._maybe_get_memory_pool_context",
        "vllm.model_executor.layers.utils:check_cpu_sgl_kernel",
        how=OVERRIDE,
    ),
    *uses(
        "the same",
        "vllm._custom_ops:_supports_onednn",
    ),
    *uses(
        "what is taken over: a model, and what drafts for it",
        *(f"{runner}:GPUModelRunner.get_model" for runner in _RUNNERS),
        "vllm.compilation.cuda_graph:CUDAGraphWrapper.unwrap",
    ),
    *uses(
        "the same, in one of two model runners",
        f"{_RUNNERS[0]}:GPUModelRunner.drafter",
        f"{_RUNNERS[1]}:GPUModelRunner.speculator",
        is_optional=True,
    ),
    *uses(
        "what it counts is of no worth while no request runs: its rows begin at zero",
        *members(
            "vllm.v1.worker.gpu.sample.penalties:PenaltiesState",
            "output_bin_counts prompt_bin_mask",
        ),
        is_optional=True,
    ),
    *uses(
        "graphs are captured in a pool of ours",
        "vllm.platforms.interface:Platform._global_graph_pool",
    ),
    *uses(
        "which weights a host copy is of",
        "vllm.v1.worker.worker_base:WorkerBase.rank",
        *members(f"{_CONFIG}.model:ModelConfig", "quantization seed"),
        f"{_CONFIG}.load:LoadConfig.load_format",
    ),
    *uses(
        "a model has its weights from a host copy, in the place of its files",
        f"{_LOADER}.base_loader:BaseModelLoader.load_config",
        f"{_LOADER}.default_loader:DefaultModelLoader",
        f"{_LOADER}.dummy_loader:DummyModelLoader",
        f"{_CONFIG}.load:LoadConfig.model_loader_extra_config",
        f"{_CONFIG}.vllm:VllmConfig.compilation_config",
    ),
    *uses(
        "each layer waits for its own weights, where a model is cut at its attentions",
        "vllm.forward_context:get_forward_context",
        "vllm.forward_context:ForwardContext.no_compile_layers",
        "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase",
        "vllm.platforms.interface:Platform.opaque_attention_op",
        "vllm.config.compilation:CompilationMode",
        "vllm.config.compilation:CompilationMode.NONE",
        *members(
            f"{_CONFIG}.compilation:CompilationConfig",
            "max_cudagraph_capture_size mode splitting_ops_contain_attention",
            "static_forward_context use_inductor_graph_partition",
        ),
        f"{_CONFIG}.parallel:ParallelConfig.use_ubatching",
    ),
    *uses(
        "whether weights have to stay",
        *members(f"{_CONFIG}.vllm:VllmConfig", "offload_config weight_transfer_config"),
        f"{_CONFIG}.parallel:ParallelConfig.enable_eplb",
        *members(f"{_CONFIG}.offload:OffloadConfig", "prefetch uva"),
        f"{_CONFIG}.offload:UVAOffloadConfig.cpu_offload_gb",
        f"{_CONFIG}.offload:PrefetchOffloadConfig.offload_group_size",
    ),
    *uses(
        "the same, in later releases",
        f"{_CONFIG}.vllm:VllmConfig.engram_config",
        is_optional=True,
    ),
)

_TRANSFER = "vllm.distributed.kv_transfer"
_OFFLOADING = f"{_TRANSFER}.kv_connector.v1.offloading"
_CONNECTOR = f"{_TRANSFER}.kv_connector.v1.offloading_connector:OffloadingConnector"

_OFFLOADS = (
    *uses(
        "which connectors are served",
        *members(
            f"{_CONFIG}.kv_transfer:KVTransferConfig",
            "engine_id kv_connector kv_connector_extra_config kv_connector_module_path",
        ),
    ),
    *uses(
        "the copies of a step, and the reports of those that are done",
        *members(
            f"{_CORE}.sched.output:SchedulerOutput",
            "kv_connector_metadata total_num_scheduled_tokens",
            "finished_req_ids num_scheduled_tokens",
        ),
        "vllm.v1.outputs:ModelRunnerOutput.kv_connector_output",
        "vllm.v1.outputs:KVConnectorOutput.kv_connector_worker_meta",
        f"{_CORE}.sched.interface:SchedulerInterface.has_requests",
        "vllm.v1.engine.llm_engine:LLMEngine.engine_core",
        "vllm.v1.engine.core_client:InprocClient.engine_core",
        f"{_TRANSFER}:get_kv_transfer_group",
        f"{_TRANSFER}:has_kv_transfer_group",
        f"{_PLAN}:FullAttentionSpec",
        f"{_PLAN}:UniformTypeKVCacheSpecs.kv_cache_specs",
        *members(
            f"{_TRANSFER}.kv_connector.v1.base:KVConnectorBase_V1",
            "get_num_new_matched_tokens handle_preemptions",
        ),
        f"{_CORE}.sched.scheduler:Scheduler.connector",
        f"{_CORE}.kv_cache_manager:KVCacheManager.get_block_ids",
        *members("vllm.v1.request:Request", "num_preemptions request_id"),
    ),
    *uses(
        "the same; those releases offload whose modules are all there",
        f"{_OFFLOADING}.common:OffloadingConnectorMetadata",
        *members(
            f"{_OFFLOADING}.common:OffloadingConnectorMetadata",
            "jobs_to_flush load_jobs store_jobs",
        ),
        *members(f"{_OFFLOADING}.common:TransferJob", "dst_spec src_spec"),
        *members(f"{_OFFLOADING}.common:OffloadingWorkerMetadata", "completed_jobs transfer_stats"),
        *members(f"{_OFFLOADING}.common:TransferStats", "load store"),
        *members(f"{_OFFLOADING}.common:DirectionalTransferStats", "bytes time"),
        f"{_OFFLOADING}.config:build_offloading_config",
        "vllm.v1.kv_offload.config:OffloadingConfig.worker_kv_bytes_per_block",
        "vllm.v1.kv_offload.base:BlockIDsLoadStoreSpec.block_ids",
        is_optional=True,
    ),
    *uses(
        "blocks that a window has left, which a connector shall forget",
        f"{_PLAN}:ChunkedLocalAttentionSpec.attention_chunk_size",
        f"{_PLAN}:MambaSpec",
        f"{_PLAN}:SlidingWindowSpec.sliding_window",
    ),
    *uses(
        "how much more than its window a layer keeps, in some releases",
        f"{_PLAN}:SlidingWindowSpec.extra_retained_tokens",
        is_optional=True,
    ),
    *uses(
        "the same; it names blocks by request and group",
        f"{_CONNECTOR}.connector_scheduler",
        *members(
            f"{_OFFLOADING}.scheduler:OffloadingConnectorScheduler",
            "_current_batch_allocated_block_ids _req_status config",
        ),
        *members(
            f"{_OFFLOADING}.scheduler:SchedulerOffloadConfig", "blocks_per_chunk kv_group_configs"
        ),
        f"{_OFFLOADING}.scheduler:GroupOffloadConfig.group_idx",
        f"{_OFFLOADING}.scheduler:RequestOffloadState.group_states",
        *members(f"{_OFFLOADING}.scheduler:RequestGroupState", "block_ids next_stored_chunk_idx"),
        is_optional=True,
    ),
)

USES = (*_BLOCKS, *_SCHEDULING, *_LAYOUT, *_SCALES, *_SLEEP, *_START, *_WEIGHTS, *_OFFLOADS)
