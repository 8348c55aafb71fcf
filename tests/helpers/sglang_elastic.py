"""Our engine over SGLang's own pools and allocators, without a server."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from kvcached_core.config import read_config
from kvcached_sglang import engine as engines
from kvcached_sglang import hooks
from kvcached_sglang.engine import SglangEngine

Hooked = tuple[type, str, Callable[[Any], Any]]


def make_engine(
    directory: Path, num_pools: int = 1, *, has_states: bool = False, **settings: int | str
) -> SglangEngine:
    """Return an engine of one rank on the host; `settings` are ours without their prefix."""
    variables = {f"KVCACHED_{name.upper()}": str(value) for name, value in settings.items()}
    return SglangEngine(
        torch.device("cpu"),
        SimpleNamespace(
            served_model_name="m", model_path="m", max_prefill_tokens=1024, load_format="auto"
        ),
        64,
        read_config({"KVCACHED_DIR": str(directory)} | variables),
        num_pools=num_pools,
        has_states=has_states,
    )


@contextmanager
def hooked(engine: SglangEngine, *hooks: Hooked) -> Iterator[None]:
    """Let SGLang's classes find `engine`; each hook is an owner, a method's name, and our hook."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(engines, "_engine", engine))
        for owner, name, wrap in hooks:
            stack.enter_context(patch.object(owner, name, wrap(getattr(owner, name))))
        yield


class NoCache:
    """A prefix cache that is off."""

    def supports_mamba(self) -> bool:
        return False

    def supports_swa(self) -> bool:
        return False

    def evictable_size(self) -> int:
        return 0


def make_allocator(engine: SglangEngine, num_tokens: int, **shape: int) -> Any:
    """Return SGLang's allocator of blocks of one token, over its pool of keys and values.

    Args:
        engine: The engine whose pages they lie in.
        num_tokens: The size that SGLang believes in.
        shape: The pool's `layer_num`, `head_num` and `head_dim`.
    """
    with hooked(
        engine,
        (MHATokenToKVPool, "_create_buffers", hooks.create_buffers),
        (TokenToKVPoolAllocator, "__init__", hooks.allocator_init),
    ):
        pool = MHATokenToKVPool(
            size=num_tokens,
            page_size=1,
            dtype=torch.float32,
            device="cpu",
            enable_memory_saver=False,
            **{"layer_num": 2, "head_num": 2, "head_dim": 1024} | shape,
        )
        return TokenToKVPoolAllocator(num_tokens, torch.float32, "cpu", pool, need_sort=False)


def tell(engine: SglangEngine) -> None:
    """Have everything done that was decided: what a schedule's end does before a step."""
    engine.port.carry_out(engine._take_orders(is_live=False), wait=True)


def let_schedule(engine: SglangEngine, tree_cache: Any) -> None:
    """Let the engine know a scheduler that has no requests."""
    engine.port.scheduler = SimpleNamespace(
        running_batch=SimpleNamespace(reqs=[]),
        last_batch=None,
        chunked_req=None,
        waiting_queue=[],
        tree_cache=tree_cache,
    )
