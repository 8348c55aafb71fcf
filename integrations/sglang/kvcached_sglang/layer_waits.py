"""Batches that begin while weights are on their way: each layer waits for its own, where it can.

SGLang computes prompts layer by layer unless it captured graphs for them, so each layer waits in
front of itself. What is in no layer is waited for in front of the first module that is called.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from kvcached_sglang.startup import startup

if TYPE_CHECKING:
    from kvcached_core.weights.own_weights import OwnWeights
    from kvcached_sglang.engine import SglangEngine


def let_layers_wait(engine: "SglangEngine", runner: Any) -> None:
    """Let each layer of later batches wait for its own weights, if that is wished and can be."""
    weights = engine.own_weights
    if weights is None or engine.config.weights_wait != "layers":
        return
    stages = weights.stages()
    reason = None
    if weights.annex is not None:
        reason = "buffers come back behind the weights; unset KVCACHED_BUFFERS"
    elif getattr(runner.server_args, "enable_two_batch_overlap", False):
        reason = "two batches take turns in a layer; do without --enable-two-batch-overlap"
    elif not _is_eager(runner):
        reason = "prompts are computed as captured graphs; switch them off for prefill"
    elif not stages.ends:
        reason = "this model has no list of layers"
    if reason is not None:
        startup.logger.warning("kvcached: steps wait for all weights: %s", reason)
        return
    weights.walk(stages.in_front_of_layers())


@contextmanager
def walking(weights: "OwnWeights", runner: Any, batch: Any) -> Iterator[None]:
    """Run a batch in the block, while weights arrive or it is not known yet how batches run."""
    from kvcached_core.weights.stages import find_layers, find_outside  # they import torch

    assert weights.walks is not None  # noqa: S101  who calls it has looked
    is_whole = batch.forward_mode.is_extend() and _is_eager(runner)
    with weights.walks.step(is_whole=is_whole) as walk, ExitStack() as hooks:
        if walk is not None:
            modules = weights.adopted.modules
            told = [(module, walk.begin) for module in find_outside(modules)]
            for number, layer in enumerate(find_layers(modules)):
                told.append((layer, partial(walk.pass_point, number)))
            for module, tell in told:
                hooks.callback(module.register_forward_pre_hook(partial(_tell, tell)).remove)
        yield


def _tell(tell: Callable[[], None], *_: Any) -> None:
    tell()


def _is_eager(runner: Any) -> bool:
    """Return whether prompts are computed without a graph."""
    graphs = getattr(runner, "prefill_cuda_graph_runner", None)
    graphs = graphs or getattr(runner, "piecewise_cuda_graph_runner", None)  # up to 0.5.13
    return graphs is None or type(graphs) is type(getattr(runner, "eager_runner", None))
