"""Batches that begin while weights are on their way: each layer waits for its own, where it can.

SGLang computes prompts layer by layer unless it captured graphs for them, so each layer waits in
front of itself.
"""

from collections.abc import Iterator
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
    from kvcached_core.weights.stages import find_layers  # it imports torch

    assert weights.walks is not None  # noqa: S101  who calls it has looked
    is_whole = batch.forward_mode.is_extend() and _is_eager(runner)
    with weights.walks.step(is_whole=is_whole) as walk, ExitStack() as hooks:
        if walk is not None:
            for number, layer in enumerate(find_layers(weights.adopted.modules)):
                hook = partial(_pass, walk.pass_point, number)
                hooks.callback(layer.register_forward_pre_hook(hook).remove)
        yield


def _pass(pass_point: Any, number: int, *_: Any) -> None:
    pass_point(number)


def _is_eager(runner: Any) -> bool:
    """Return whether prompts are computed without a graph."""
    graphs = getattr(runner, "prefill_cuda_graph_runner", None)
    graphs = graphs or getattr(runner, "piecewise_cuda_graph_runner", None)  # up to 0.5.13
    return graphs is None or type(graphs) is type(getattr(runner, "eager_runner", None))
