"""What takes the place of SGLang's methods around copies between the device and the host."""

import functools
from collections.abc import Callable
from typing import Any

from kvcached_sglang.engine import SglangEngine, around_engine, engine

Call = Callable[[], Any]


@around_engine
def start_writing(call: Call, ours: SglangEngine, self: Any) -> None:
    """Wrap `HiCacheController.start_writing`: what is copied stays mapped."""
    if ours.copies is None or not self.write_queue:
        call()
    else:
        ours.copies.store(self, call)


@around_engine
def start_loading(call: Call, ours: SglangEngine, self: Any) -> Any:
    """Wrap `HiCacheController.start_loading`: what is loaded into is mapped before."""
    if ours.copies is None or not self.load_queue:
        return call()
    return ours.copies.load(self, call)


@around_engine
def controller_reset(call: Call, ours: SglangEngine, self: Any) -> None:
    """Wrap `HiCacheController.reset`: it forgets all copies, and may free what they are of."""
    if ours.copies is not None:
        ours.copies.reset(self)
    call()


@around_engine
def flush_cache(call: Call, ours: SglangEngine, self: Any) -> Any:
    """Wrap `Scheduler.flush_cache`: SGLang refuses to flush while copies are open."""
    if ours.copies is not None:
        ours.copies.finish(self.tree_cache)
    return call()


def process_batch_result(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Scheduler.process_batch_result`: where a tier is on disk, it says how fast we compute.

    By then the batch has run, also where the next one was launched before.
    """

    @functools.wraps(original)
    def wrapper(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, batch, *args, **kwargs)
        ours = engine()
        if ours is not None and ours.tier is not None:
            is_prompts = batch.forward_mode.is_extend()
            ours.tier.computed(sum(batch.extend_lens or ()) if is_prompts else 0)
        return result

    return wrapper
