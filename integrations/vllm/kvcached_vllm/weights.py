"""What an engine allocates before its KV cache: near enough to make room for it."""

from typing import Any

from kvcached_core.memory.model_bytes import OTHER_BYTES, ModelBytes, model_bytes


def static_bytes(vllm_config: Any) -> int:
    """Return an estimate of the bytes on each device: weights and what comes with them."""
    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    weights_bytes = _model_bytes(vllm_config, model).on_rank(
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
    )
    speculative: Any = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if draft is not None and draft.model != model.model:
        weights_bytes += _model_bytes(vllm_config, draft).on_rank(
            tensor_parallel=speculative.draft_tensor_parallel_size or 1
        )
    return weights_bytes + OTHER_BYTES


def _model_bytes(vllm_config: Any, model: Any) -> ModelBytes:
    return model_bytes(
        str(model.model),
        model.hf_config,
        int(model.dtype.itemsize),
        revision=model.revision,
        cache_dir=vllm_config.load_config.download_dir,
    )
