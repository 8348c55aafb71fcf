"""What a scheduler's process allocates beside its KV cache: near enough to make room for it."""

from itertools import chain
from typing import Any

from kvcached_core.memory.model_bytes import model_bytes


def weight_bytes(runner: Any) -> int:
    """Return an estimate of the bytes of weights on each device.

    Args:
        runner: SGLang's model runner, before it loads.
    """
    arguments, model = runner.server_args, runner.model_config
    whole = model_bytes(
        str(model.model_path),
        model.hf_config,
        int(model.dtype.itemsize),
        revision=getattr(arguments, "revision", None),
        cache_dir=getattr(arguments, "download_dir", None),
    )
    return whole.on_rank(tensor_parallel=int(arguments.tp_size))


def loaded_bytes(model: Any) -> int:
    """Return what the parameters and buffers of a loaded model take, in bytes."""
    tensors = chain(model.parameters(), model.buffers())
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
