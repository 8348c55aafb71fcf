"""A scheduler's weights: taken over when they are loaded, and given while nothing runs on them."""

from functools import partial
from typing import TYPE_CHECKING, Any

from kvcached_core.config import HOST, Config
from kvcached_core.memory.model_bytes import OTHER_BYTES, find_folder
from kvcached_core.memory.torch_device import architecture
from kvcached_sglang.obstacles import weight_obstacles
from kvcached_sglang.restart_hooks import PACKAGES as PACKAGES_OF_MODELS
from kvcached_sglang.startup import startup

if TYPE_CHECKING:
    from kvcached_core.weights.key import Origin
    from kvcached_core.weights.restart import Restart
    from kvcached_sglang.engine import SglangEngine

# What of SGLang keeps buffers, beside a model's modules.
PACKAGES = ("sglang.srt.layers", "sglang.srt.model_executor")


def may_yield(arguments: Any, config: Config) -> bool:
    """Return whether weights are given, too; if they should be and cannot, say why.

    Args:
        arguments: A `ServerArgs`.
        config: Our settings.
    """
    return startup.may_yield(config, weight_obstacles(arguments))


def restart_of(engine: "SglangEngine", runner: Any) -> "Restart | None":
    """Return how a model is loaded whose weights yield; None: as SGLang does."""
    import torch

    from kvcached_core.weights.restart import make_restart

    if not engine.may_yield or getattr(runner, "is_draft_worker", False):
        return None
    device, origin_of = torch.device(runner.device), partial(_origin, runner)
    return make_restart(engine.config, device, origin_of, PACKAGES_OF_MODELS)


def take_over_weights(engine: "SglangEngine", runner: Any) -> None:
    """Take the weights of a loaded model over, and let the ledger count them; on all ranks.

    It comes when the model is as it will be captured, and before its KV cache has a size.

    Args:
        engine: The engine, which knows nothing of its weights yet.
        runner: SGLang's model runner, or what plans the KV cache for it.
    """
    import torch

    from kvcached_core.weights.own_annex import make_annex
    from kvcached_core.weights.own_weights import take_over

    device, ranks = torch.device(runner.device), engine.ranks
    annex = make_annex(device, engine.config, runner.model_config.model_path)
    origin_of = partial(_origin, runner)
    modules = {"model": runner.model}
    weights = take_over(modules, device, engine.config, origin_of, annex, restart=engine.restart)
    if annex is not None and annex.graph_pool is not None:
        _use_graph_pool(annex.graph_pool)
    if engine.device.kind == HOST:
        ranks.announce(0 if weights is None else weights.num_bytes)
    if weights is not None:
        weights.rank.join(ranks.seat)
        engine.own_weights, engine.port.weights = weights, weights.rank
    ranks.merge(engine.port.weight_status())  # what all ranks hold is counted now
    if engine.device.kind != HOST:
        ranks.announce(OTHER_BYTES)


def move_buffers(engine: "SglangEngine", runner: Any, graphs: Any = None) -> None:
    """Let large buffers go with the weights, before any graph is captured.

    The pools of requests and tokens are left out: they are changed while nothing runs.

    Args:
        engine: The engine.
        runner: SGLang's model runner.
        graphs: What is about to capture, if anything does.
    """
    weights = engine.own_weights
    if weights is not None and weights.annex is not None:
        roots = {"runner": runner, "graphs": graphs, "table": runner.req_to_token_pool.req_to_token}
        weights.annex.move(roots, PACKAGES)


def begin_to_yield(engine: "SglangEngine", runner: Any) -> None:
    """Let neighbours have the weights from now on: the engine is ready to serve. On all ranks."""
    if not engine.may_yield:
        return
    weights = engine.own_weights
    if weights is not None:
        if engine.device.kind == HOST:
            move_buffers(engine, runner)  # nothing is captured there
        weights.end_start()
    if engine.yield_weights(engine.config) and weights is not None:
        weights.rank.begin_copy()


def _use_graph_pool(pool: tuple[int, int]) -> None:
    """Let SGLang capture its graphs in a pool of ours, where a release has one for all of them."""
    try:
        from sglang.srt.model_executor.runner_utils.pool import set_global_graph_memory_pool
    except ImportError:
        return
    set_global_graph_memory_pool(pool)


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
