"""What takes the place of SGLang's methods; each gets the original and returns a wrapper."""

import functools
import select
from collections.abc import Callable
from typing import Any

from kvcached_core.memory import layer_tensors
from kvcached_patches.around import around
from kvcached_sglang import pools
from kvcached_sglang.engine import SglangEngine, around_engine, engine
from kvcached_sglang.index_pool import is_laid_out
from kvcached_sglang.layer_waits import walking
from kvcached_sglang.requests import (
    answer_health_checks,
    has_beams,
    is_asleep,
    skip_health_checks,
)
from kvcached_sglang.startup import startup

Call = Callable[[], Any]
# Heads inside tokens, and tokens inside heads, in a block of each.
SERVED_LAYOUTS = ("nhd", "hnd")


@around_engine
def kv_cache_init(call: Call, _ours: SglangEngine, self: Any) -> None:
    """Wrap `KVCache.__init__`: a pool that cannot lie in our pages ends the start, not yet made.

    What a pool keeps beside its planes, it finds by the same ids, of which we make more.
    """
    pools.check_class(type(self))
    call()


@around_engine
def create_buffers(call: Call, ours: SglangEngine, self: Any) -> None:
    """Wrap a KV pool's `_create_buffers`: its planes lie in our pages."""
    if ours.has_all_pools or is_laid_out.get():
        call()
        return
    layout = getattr(self, "kv_cache_layout", "nhd")
    if layout not in SERVED_LAYOUTS:
        startup.end(f"the KV layout {layout!r} cannot be served; unset it")
    num_rows = self.size + self.page_size
    with startup.one_message():
        shape = layer_tensors.measure(call, num_rows, self.page_size)
        if ours.placing.is_complete:
            ours.drafts.lay_out(call, self, shape)
            return
        geometry, arena = ours.place_pool(shape, self.layer_num)
    self.size = layer_tensors.num_rows(shape, geometry, arena.num_pages) - self.page_size
    pools.count_blocks(self)
    layer_tensors.lay_out(call, shape, geometry, arena)
    ours.drafts.follow(shape, geometry, arena)
    self.kvcached = geometry


@around_engine
def allocator_init(call: Call, ours: SglangEngine, self: Any) -> None:
    """Wrap an allocator's `__init__`: over an elastic pool it becomes an elastic allocator."""
    call()
    pool = self.get_kvcache()
    pools.check_class(type(pool))
    # A hybrid's pool has one of keys and values inside; its states have another allocator.
    geometry = getattr(getattr(pool, "full_kv_pool", pool), "kvcached", None)
    if geometry is not None and len(ours.pools) < ours.placing.num_pools:
        from kvcached_sglang.allocators import make_elastic

        make_elastic(self, functools.partial(ours.make_pages, geometry), ours, len(ours.pools))
        if ours.states is not None:
            ours.states.make_elastic(len(ours.pools))


@around_engine
def two_pools_init(call: Call, _ours: SglangEngine, self: Any) -> None:
    """Wrap `__init__` of the allocator of two pools: its map covers the ids of elastic pages."""
    call()
    pool = self.get_kvcache()
    pools.check_class(type(pool))
    if getattr(pool, "swa_req_ring_size", None) is not None:
        startup.end("a ring of window tokens for each request is not served")
    mapping = self.full_to_swa_index_mapping
    longer = mapping.new_zeros(pool.full_kv_pool.size + self.page_size + 1)
    longer[-1] = -1  # no token before a prompt's first, in either pool
    self.full_to_swa_index_mapping = longer
    pool.register_mapping(longer)


def get_next_batch_to_run(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Scheduler.get_next_batch_to_run`: promises are taken before, and end after it."""

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = engine()
        if ours is None:
            return original(self, *args, **kwargs)
        ours.port.scheduler = self
        if not ours.activation.is_active:
            skip_health_checks(self)
        states = ours.states
        if states is not None:
            states.set_aside((self.last_batch,), self.tree_cache)
        ours.before_schedule()
        plan = original(self, *args, **kwargs)
        if ours.copies is not None:
            ours.copies.settle()
        batch = getattr(plan, "batch_to_run", plan)
        if states is not None:
            states.set_aside((self.last_batch, batch), self.tree_cache)
        if batch is None and self.last_batch is None:
            answer_health_checks(self)
        ours.after_schedule(has_batch=batch is not None)
        return plan

    return wrapper


def process_input_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Scheduler.process_input_requests`: a paused loop answers neighbours here.

    It schedules nothing, and one that was about to wake would hold up who wakes after it. What was
    released stays away until it is resumed. Copies end meanwhile, and what they kept may go. Where
    a batch was launched before the pause, weights stay for it.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if self._engine_paused:
            ours = engine()
            if ours is not None and not is_asleep(self):
                ours.port.scheduler = self
                if ours.copies is not None:
                    ours.copies.look(self.tree_cache)
                    ours.copies.settle()
                if self.last_batch is None:
                    ours.answer_ring()
                else:
                    ours.between_steps()
        return result

    return wrapper


@around_engine
def maybe_sleep_on_idle(call: Call, ours: SglangEngine, self: Any) -> None:
    """Wrap `Scheduler.maybe_sleep_on_idle`: who wants something of an idle engine wakes it.

    A server that polls no sockets, but a queue of its own, sleeps as it does.
    """
    poller = getattr(self.idle_sleeper, "poller", None)
    if poller is None:
        call()
        return
    descriptor = ours.port.nap.descriptor
    if descriptor not in poller:
        poller.register(descriptor, select.POLLIN)
    ours.sleep_until_rung(call)


def run_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Scheduler.run_batch`: what it may touch is mapped, and weights are waited for.

    With `KVCACHED_DEBUG` every block that it names is looked up.
    """

    @functools.wraps(original)
    def wrapper(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        ours = engine()
        if ours is not None:
            ours.begin_batch()
            if ours.config.debug and ours.pools:
                ours.check(self, batch)
            weights = ours.own_weights
            if weights is not None and weights.walks is not None and weights.walks.is_due:
                with walking(weights, self.tp_worker.model_runner, batch):
                    return original(self, batch, *args, **kwargs)
        return original(self, batch, *args, **kwargs)

    return wrapper


def get_new_batch_prefill(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_new_batch_prefill`: what needs memory that is not there waits.

    A prompt of which a part is computed: SGLang goes on with it unasked, since it counted on the
    memory when the prompt began; a limit or a neighbour may have taken it since. And every request
    to an engine that sleeps.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = engine()
        if ours is None or not (is_asleep(self) or ours.must_hold()):
            return original(self, *args, **kwargs)
        if ours.copies is not None:
            ours.copies.look(self.tree_cache)
        running = [*args, *kwargs.values()]
        if not running:
            return None
        from sglang.srt.managers.schedule_batch import NextBatchPlan

        return NextBatchPlan(batch_to_run=None, running_batch=running[0])

    return wrapper


@around_engine
def get_pool_stats(call: Call, ours: SglangEngine, _self: Any) -> Any:
    """Wrap `get_pool_stats`: used, cached and free tokens add up to the whole virtual pool."""
    for free_list in ours.free_lists:
        free_list.is_nominal = True
    try:
        return call()
    finally:
        for free_list in ours.free_lists:
            free_list.is_nominal = False


@around
def retract_decode(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `ScheduleBatch.retract_decode`: the last request waits, too, instead of being aborted.

    Alone on a device it would be lost either way; beside neighbours there will be room again. One
    with several beams cannot wait: SGLang computes none of them again.
    """
    ours, check = engine(), self.check_decode_mem
    if ours is None:
        return original(self, *args, **kwargs)

    def pay_and_check(selected_indices: Any = None) -> bool:
        ours.pay()
        return bool(check(selected_indices=selected_indices))

    def check_but_keep_the_last(selected_indices: Any = None) -> bool:
        is_last = selected_indices is not None and len(selected_indices) <= 1
        if is_last and not any(has_beams(self.reqs[index]) for index in selected_indices):
            return True
        return pay_and_check(selected_indices)

    self.check_decode_mem = check_but_keep_the_last
    try:
        retracted, ratio, aborted = original(self, *args, **kwargs)
    finally:
        del self.check_decode_mem
    if len(self.reqs) == 1 and not has_beams(self.reqs[0]) and not pay_and_check():
        request = self.reqs[0]
        self.release_req(0, 0, *args, **kwargs)
        self.filter_batch(keep_indices=[])
        retracted = [*retracted, request]
    return retracted, ratio, aborted
