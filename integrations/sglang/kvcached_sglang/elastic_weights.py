"""A scheduler's weights: taken over when they are loaded, and given while nothing runs on them."""

from functools import partial
from typing import TYPE_CHECKING, Any

from kvcached_core.config import HOST, Config
from kvcached_core.memory.model_bytes import OTHER_BYTES, find_folder
from kvcached_core.memory.torch_device import architecture
from kvcached_sglang.obstacles import weight_obstacles
from kvcached_sglang.startup import startup

if TYPE_CHECKING:
    from kvcached_core.weights.key import Origin
    from kvcached_sglang.engine import SglangEngine


def may_yield(arguments: Any, config: Config) -> bool:
    """Return whether weights are given, too; if they should be and cannot, say why.

    Args:
        arguments: A `ServerArgs`.
        config: Our settings.
    """
    return startup.may_yield(config, weight_obstacles(arguments))


def take_over_weights(engine: "SglangEngine", runner: Any) -> None:
    """Take the weights of a loaded model over, and let the ledger count them; on all ranks.

    It comes when the model is as it will be captured, and before its KV cache has a size.

    Args:
        engine: The engine, which knows nothing of its weights yet.
        runner: SGLang's model runner, or what plans the KV cache for it.
    """
    import torch

    from kvcached_core.weights.own_weights import take_over

    device, ranks = torch.device(runner.device), engine.ranks
    weights = take_over({"model": runner.model}, device, engine.config, partial(_origin, runner))
    if weights is not None:
        if engine.device.kind == HOST:
            ranks.announce(weights.num_bytes)
        weights.rank.join(ranks.seat)
        engine.own_weights, engine.port.weights = weights, weights.rank
    ranks.merge(engine.port.weight_status())  # what all ranks hold is counted now
    if engine.device.kind != HOST:
        ranks.announce(OTHER_BYTES)


def begin_to_yield(engine: "SglangEngine") -> None:
    """Let neighbours have the weights from now on: the engine is ready to serve. On all ranks."""
    weights = engine.port.weights
    if engine.may_yield and engine.yield_weights(engine.config) and weights is not None:
        weights.begin_copy()


def _origin(runner: Any, layout_digest: str) -> "Origin":
    import torch
    from sglang.srt.distributed.parallel_state import get_tp_group

    from kvcached_core.weights.key import Origin, mark_files

    arguments, model, group = runner.server_args, runner.model_config, get_tp_group()
    path, revision = str(model.model_path), getattr(arguments, "revision", None)
    folder = find_folder(path, revision=revision, cache_dir=arguments.download_dir)
    return Origin(
        model=path,
        revision=revision,
        load_format=str(arguments.load_format),
        files=mark_files(folder),
        seed=arguments.random_seed or 0,
        dtype=str(model.dtype),
        quantization=model.quantization,
        tensor_parallel=(len(group.ranks), group.rank_in_group),
        engine=startup.engine,
        device=architecture(torch.device(runner.device)),
        layout_digest=layout_digest,
    )
