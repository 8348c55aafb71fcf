"""Hooks around what reads or writes weights beside a step: they are all there first."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvcached_patches.around import OURS, around, around_ours
from kvcached_vllm.elastic_weights import follow_weights

if TYPE_CHECKING:
    from kvcached_vllm.engine import VllmEngine

# Methods of a worker that write all weights; what others write is seen before weights are given.
UPDATES = frozenset({"reload_weights", "update_weights", "finish_weight_update", "reset_weights"})


@around_ours
def engine_core_uses_weights(call: Callable[[], Any], engine: "VllmEngine", _self: Any) -> Any:
    """Wrap a method of `EngineCore` that reads or writes weights."""
    if not engine.yields_weights:
        return call()
    with engine.awake():
        return call()


@around
def engine_core_collective_rpc(
    original: Any, self: Any, method: Any, *args: Any, **kwargs: Any
) -> Any:
    """Wrap `EngineCore.collective_rpc`, by which others have workers do whatever they want.

    What vLLM itself has them do goes by the executor's method of that name.
    """
    engine: VllmEngine | None = getattr(self, OURS, None)
    if engine is None or not engine.yields_weights:
        return original(self, method, *args, **kwargs)
    with engine.awake():
        try:
            return original(self, method, *args, **kwargs)
        finally:
            is_update = isinstance(method, str) and method in UPDATES
            self.model_executor.collective_rpc(follow_weights, args=(is_update,))
