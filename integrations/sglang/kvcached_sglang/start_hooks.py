"""What takes the place of SGLang's methods at a start, up to its first pool."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from kvcached_core.config import HOST
from kvcached_core.engine.kinds import elastic_parts
from kvcached_core.engine.start import SAID, said_once
from kvcached_core.engine.starting import Start
from kvcached_core.memory.model_bytes import OTHER_BYTES
from kvcached_core.units import GIB
from kvcached_patches.around import around
from kvcached_sglang import obstacles
from kvcached_sglang.elastic_weights import (
    begin_to_yield,
    move_buffers,
    restart_of,
    take_over_weights,
)
from kvcached_sglang.engine import engine, logger, start_engine
from kvcached_sglang.layer_waits import let_layers_wait
from kvcached_sglang.parallel import has_ranks
from kvcached_sglang.restart_hooks import restarting
from kvcached_sglang.sleep_hooks import WEIGHTS
from kvcached_sglang.startup import check_arguments, startup
from kvcached_sglang.weights import loaded_bytes, weight_bytes

# How a process ends that has said why, or that one which it launched has ended.
ENDS = (SAID, -signal.SIGTERM)


def launch_subprocesses(original: Any) -> Any:
    """Wrap `Engine._launch_subprocesses`, a class method: SGLang's API has no command line."""
    launch = original.__func__

    def wrapper(cls: type, server_args: Any, *args: Any, **kwargs: Any) -> Any:
        check_arguments(server_args)
        return launch(cls, server_args, *args, **kwargs)

    return classmethod(wrapper)


@around
def wait_for_scheduler_ready(
    original: Any, scheduler_pipe_readers: Any, scheduler_procs: Any
) -> Any:
    """Wrap `_wait_for_scheduler_ready`: nothing is added to what a scheduler's process has said."""
    try:
        return original(scheduler_pipe_readers, scheduler_procs)
    except Exception:
        if any(process.exitcode in ENDS for process in scheduler_procs):
            raise SystemExit(1) from None
        raise


@contextmanager
def _ending_who_waits(server_args: Any) -> Iterator[None]:
    """End what launched a data-parallel rank together with it: it would wait for it for ever."""
    try:
        yield
    except SystemExit:
        if has_ranks(server_args):
            os.kill(os.getppid(), signal.SIGTERM)
        raise


@around
def scheduler_init(original: Any, self: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap `Scheduler.__init__`: what of ours ends a start is one message, said by one rank.

    At its end the engine is ready, with all that it captures.
    """
    with _ending_who_waits(server_args), said_once():
        original(self, server_args, *args, **kwargs)
        ours = engine()
        if ours is None:
            return
        runner = self.tp_worker.model_runner
        begin_to_yield(ours, runner)
        let_layers_wait(ours, runner)
        controller = getattr(self.tree_cache, "cache_controller", None)
        if ours.copies is not None and controller is not None:
            with startup.one_message():
                ours.copies.meet(controller)
        model = runner.model_config
        parts = elastic_parts(
            "SGLang", generates=model.is_generation, is_multimodal=model.is_multimodal
        )
        if parts is not None:
            logger.info("kvcached: %s", parts)


@around
def load_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `ModelRunner.load_model`: before it is decided whether we serve; nothing is sized yet.

    Neighbours make room for the weights, as in vLLM's worker; on a host, for those that yield: the
    others are not counted there. What fails after it ends the start, under `auto`, too: SGLang is
    told the virtual size then.
    """
    if engine() is None and startup.is_on:
        found = obstacles.argument_obstacles(self.server_args), obstacles.model_obstacles(self)
        if startup.serves(chain(*found)):
            start_engine(self)
    ours = engine()
    if ours is not None and getattr(self, "is_draft_worker", False):
        ours.drafts.add(self)
    is_on_host = ours is not None and ours.device.kind == HOST
    if ours is None or (is_on_host and not ours.may_yield):
        return original(self, *args, **kwargs)
    other_bytes = 0 if is_on_host else OTHER_BYTES
    start = Start(ours.config.page_bytes, ours.may_yield)
    ours.make_room_for(weight_bytes(self) + other_bytes, start)
    restart = restart_of(ours, self)
    with restarting(restart):
        answer = original(self, *args, **kwargs)
    if restart is not None:
        ours.restart = restart
    if not is_on_host:
        ours.ranks.announce(other_bytes)
    if getattr(self.server_args, "enable_memory_saver", False) and not ours.may_yield:
        ours.saved.at_least(WEIGHTS, loaded_bytes(self.model))
    return answer


@around
def capture(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `capture` of what captures graphs: large buffers become ours before the first one."""
    ours = engine()
    if ours is not None:
        move_buffers(ours, self.model_runner, self)
    return original(self, *args, **kwargs)


@around
def profile_available_bytes(original: Any, self: Any, *args: Any, **kwargs: Any) -> int:
    """Wrap `_profile_available_bytes`: the limit is the virtual size, not what is free.

    Here weights that yield become ours: nothing changes the model any more.
    """
    ours = engine()
    if ours is None:
        return original(self, *args, **kwargs)
    if ours.may_yield:
        with startup.one_message():
            take_over_weights(ours, self)
    virtual_bytes = ours.virtual_bytes
    if ours.states is not None:
        ours.states.tell_size(self)
    elif obstacles.has_states(self):
        # The states' pool stays SGLang's own, and the original is what would have sized it.
        size_states = getattr(self, "_handle_max_mamba_cache", None)
        size_states = size_states or self.handle_max_mamba_cache  # up to 0.5.15
        return int(size_states(virtual_bytes / GIB) * GIB)
    return virtual_bytes
