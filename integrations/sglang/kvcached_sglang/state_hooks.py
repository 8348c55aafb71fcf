"""What takes the place of SGLang's methods for states that layers keep of requests."""

import inspect
from collections.abc import Callable
from typing import Any

from kvcached_patches.around import around
from kvcached_sglang.engine import SglangEngine, around_engine, engine
from kvcached_sglang.startup import startup

Call = Callable[[], Any]


@around
def mamba_pool_init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap `MambaPool.__init__`: the states of all layers lie in our pages."""
    ours = engine()
    if ours is None or ours.states is None or ours.has_all_pools:
        original(self, *args, **kwargs)
        return
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    with startup.one_message():
        ours.states.lay_out(
            lambda num_slots: original(**{**given, "self": self, "size": num_slots}),
            given["cache_params"],
            len(given["mamba_layer_ids"]),
        )


@around_engine
def slot_allocator_init(call: Call, ours: SglangEngine, self: Any) -> None:
    """Wrap `MambaSlotAllocator.__init__`: over elastic states it becomes elastic."""
    call()
    if ours.states is not None:
        ours.states.add_allocator(self)


@around_engine
def get_num_allocatable_reqs(call: Call, ours: SglangEngine, self: Any) -> int:
    """Wrap `Scheduler.get_num_allocatable_reqs`: no more than there are states for."""
    num_requests: int = call()
    if ours.states is None:
        return num_requests
    return ours.states.limit_requests(num_requests, self.tree_cache)
