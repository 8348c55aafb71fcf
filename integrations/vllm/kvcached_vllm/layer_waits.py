"""Steps that begin while weights are on their way: each layer waits for its own, where vLLM can.

Compiled code runs no hooks of modules. But every attention looks its layer up by name in the
forward's context, and vLLM's compiler cuts a model there. So what lies between two attentions is
waited for at the first one. What is captured as a graph is not cut when it runs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from kvcached_core.config import read_config
from kvcached_vllm.elastic_weights import weights_of
from kvcached_vllm.startup import startup

if TYPE_CHECKING:
    import torch

    from kvcached_core.weights.walks import Walk, Walks

# Where a worker has its `Walks`.
WALKS = "kvcached_walks"


class PassedLayers(dict[str, Any]):
    """The layers of a forward by their names; who looks one up passes its point.

    Args:
        layers: vLLM's own.
        points: The number of the point in each layer that has one.
        walk: What has to know of it.
    """

    def __init__(self, layers: Mapping[str, Any], points: Mapping[str, int], walk: "Walk") -> None:
        super().__init__(layers)
        self._points = points
        self._walk = walk

    def __getitem__(self, name: str) -> Any:
        point = self._points.get(name)
        if point is not None:
            self._walk.pass_point(point)
        return super().__getitem__(name)


def let_layers_wait(worker: Any) -> None:
    """Let each layer of later steps wait for its own weights, if that is wished and can be."""
    weights = weights_of(worker)
    if weights is None or read_config().weights_wait != "layers":
        return
    from kvcached_core.weights.stages import find_layers  # it imports torch

    layers = find_layers(weights.adopted.modules)
    numbers = _numbers(worker.vllm_config, layers)
    reason = _obstacle(worker.vllm_config)
    if weights.annex is not None:
        reason = "buffers come back behind the weights; unset KVCACHED_BUFFERS"
    elif not numbers:
        reason = "no layer of this model has an attention"
    if reason is not None:
        startup.logger.warning("kvcached: steps wait for all weights: %s", reason)
        return
    hooked = sorted(set(numbers.values()))
    weights.walk(weights.stages().inside_layers(hooked))
    worker.kvcached_points = {name: hooked.index(layer) for name, layer in numbers.items()}
    setattr(worker, WALKS, weights.walks)


@contextmanager
def walking(worker: Any, walks: "Walks", scheduler_output: Any) -> Iterator[None]:
    """Run a step in the block, while weights arrive or it is not known yet how steps run."""
    num_tokens: int = scheduler_output.total_num_scheduled_tokens
    with walks.step(is_whole=num_tokens > _captured_tokens(worker.vllm_config)) as walk:
        if walk is None:
            yield
            return
        if _embeds_before(worker.vllm_config.model_config):
            walk.begin()
        hook = partial(_enter, worker.kvcached_points, walk)
        handle = worker.model_runner.get_model().register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def _enter(points: Mapping[str, int], walk: "Walk", *_: Any) -> None:
    from vllm.forward_context import get_forward_context

    walk.begin()
    context = get_forward_context()
    context.no_compile_layers = PassedLayers(context.no_compile_layers, points, walk)


def _numbers(vllm_config: Any, layers: "list[torch.nn.Module]") -> dict[str, int]:
    """Return in which layer each attention is, by the names that vLLM looks them up by."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    places = {id(part): number for number, layer in enumerate(layers) for part in layer.modules()}
    named = vllm_config.compilation_config.static_forward_context
    return {
        name: places[id(one)]
        for name, one in named.items()
        if isinstance(one, AttentionLayerBase) and id(one) in places
    }


def _embeds_before(model_config: Any) -> bool:
    """Return whether vLLM may look embeddings up, or encode, in front of the model's forward."""
    return bool(model_config.is_multimodal_model or model_config.enable_prompt_embeds)


def _captured_tokens(vllm_config: Any) -> int:
    """Return the tokens of the largest step that is a captured graph, or made of such."""
    return vllm_config.compilation_config.max_cudagraph_capture_size or 0


def _obstacle(vllm_config: Any) -> str | None:
    from vllm.config.compilation import CompilationMode
    from vllm.platforms import current_platform

    config = vllm_config.compilation_config
    if vllm_config.parallel_config.use_ubatching:
        return "a step runs in parts side by side; do without --ubatch-size"
    if config.mode == CompilationMode.NONE:
        return None
    if not current_platform.opaque_attention_op():
        return "this platform compiles attention together with layers; use --enforce-eager"
    if config.use_inductor_graph_partition or not config.splitting_ops_contain_attention():
        return "this model is not compiled in pieces; remove the setting of --compilation-config"
    return None
