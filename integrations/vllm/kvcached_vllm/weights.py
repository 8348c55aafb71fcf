"""What an engine allocates before its KV cache: near enough to make room for it."""

from typing import Any

from kvcached_core.model_bytes import OTHER_BYTES, model_bytes


def static_bytes(vllm_config: Any) -> int:
    """Return an estimate of the bytes on each device: weights and what comes with them."""
    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    whole = model_bytes(
        str(model.model),
        model.hf_config,
        int(model.dtype.itemsize),
        revision=model.revision,
        cache_dir=vllm_config.load_config.download_dir,
    )
    weights_bytes = whole.on_rank(
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
    )
    return weights_bytes + OTHER_BYTES
