"""What an engine allocates before its KV cache: near enough to make room for it."""

from typing import Any

from kvcached_core.config import CUDA
from kvcached_core.memory.model_bytes import OTHER_BYTES, model_bytes


def static_bytes(vllm_config: Any) -> int:
    """Return an estimate of the bytes on each device: weights, and on a GPU what comes beside."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    models = [(model, parallel.tensor_parallel_size, parallel.pipeline_parallel_size)]
    speculative: Any = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if draft is not None and draft.model != model.model:
        models.append((draft, speculative.draft_tensor_parallel_size or 1, 1))
    weights_bytes = OTHER_BYTES if vllm_config.device_config.device_type == CUDA else 0
    for one, tensor_parallel, pipeline_parallel in models:
        weights_bytes += model_bytes(
            str(one.model),
            one.hf_config,
            int(one.dtype.itemsize),
            revision=one.revision,
            cache_dir=vllm_config.load_config.download_dir,
        ).on_rank(tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
    return weights_bytes
