"""What an engine allocates before its KV cache: near enough to make room for it."""

from pathlib import Path
from typing import Any

from kvcached_core.units import GIB

# CUDA context, libraries, activations of the profile run and CUDA graphs: about 2 GiB for an 8B
# model. What is wrong with it the headroom has to bear.
OTHER_BYTES = 2 * GIB
SUFFIXES = (".safetensors", ".bin", ".pt")


def static_bytes(vllm_config: Any) -> int:
    """Return an estimate of the bytes on each device: weights and what comes with them."""
    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    whole_bytes = _files_bytes(Path(str(model.model))) or _shape_bytes(model)
    return whole_bytes // int(parallel.world_size) + OTHER_BYTES


def _files_bytes(folder: Path) -> int:
    """Return the size of the weight files in a folder, of the first kind that is there."""
    for suffix in SUFFIXES:
        sizes = [file.stat().st_size for file in folder.glob(f"*{suffix}")]
        if sizes:
            return sum(sizes)
    return 0


def _shape_bytes(model_config: Any) -> int:
    """Return the size of a transformer's matrices, from the shape in its configuration."""
    shape = model_config.hf_text_config
    hidden = int(getattr(shape, "hidden_size", 0))
    inner = int(getattr(shape, "intermediate_size", None) or 4 * hidden)
    num_experts = int(getattr(shape, "num_local_experts", None) or 1)
    num_layers = int(getattr(shape, "num_hidden_layers", 0))
    num_words = int(getattr(shape, "vocab_size", 0))
    per_layer = 4 * hidden * hidden + 3 * hidden * inner * num_experts
    return (num_layers * per_layer + 2 * num_words * hidden) * int(model_config.dtype.itemsize)
