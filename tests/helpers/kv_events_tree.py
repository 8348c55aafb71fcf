"""SGLang's own tree and event publisher over our pages, and requests to them, without a server."""

import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from helpers.kv_mirror import Mirror
from helpers.sglang_elastic import let_schedule, make_allocator, make_engine, tell
from helpers.tree_reports import report_of
from kvcached_core.engine.ranks import WantedPages
from kvcached_core.units import MIB
from kvcached_demo.harness.server import free_port

PAGE = 2 * MIB
POOL = 24 * MIB
NUM_TOKENS = 700


@dataclass(eq=False)
class Running:
    """A request: its tokens, the node of its prefix that it locks, and its ids."""

    tokens: list[int]
    node: Any
    lock: Any
    ids: torch.Tensor
    num_kept: int


class PublishedTree:
    """A prefix cache that publishes what it stores and removes.

    Attributes:
        engine: What gives pages.
        running: The requests.
        mirror: What its events say.

    Args:
        folder: Where the ledger is.
    """

    def __init__(self, folder: Path) -> None:
        from sglang.srt.disaggregation.kv_events import EventPublisherFactory
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams

        self.engine = make_engine(
            folder, host_pool=POOL, page_bytes=PAGE, min_spare_pages=0, max_spare_pages=0
        )
        self.allocator = make_allocator(self.engine, NUM_TOKENS)
        params: Any = CacheInitParams(
            disable=False,
            req_to_token_pool=SimpleNamespace(),
            token_to_kv_pool_allocator=self.allocator,
            page_size=1,
            enable_kv_cache_events=True,
        )
        self.cache = _make_cache(params)
        port = free_port()
        config = f'{{"publisher": "zmq", "endpoint": "tcp://*:{port}"}}'
        self._publisher = EventPublisherFactory.create(config, 0)
        self.mirror = Mirror(f"tcp://127.0.0.1:{port}")
        let_schedule(self.engine, self.cache)
        events = SimpleNamespace(publish_kv_events=self.publish)
        self.engine.port.scheduler.kv_events_publisher = events
        self.running: list[Running] = []

    def publish(self) -> None:
        """Publish what SGLang noted, as its own part of the scheduler does."""
        from sglang.srt.disaggregation.kv_events import KVEventBatch

        events = self.cache.take_events()
        if events:
            self._publisher.publish(KVEventBatch(ts=time.time(), events=events))

    def begin(self, tokens: list[int]) -> None:
        """Let a request in if there is memory for it: find what is cached, and lock it."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        cache, allocator = self.cache, self.allocator
        found = cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens), None)))
        node = getattr(found, "last_device_node", None)
        ids = getattr(found, "device_indices", None)
        if ids is None:
            ids = cache.path_device_indices(node)
        lock = cache.inc_lock_ref(node)
        request = Running(tokens, node, lock, ids, len(ids))
        missing = len(tokens) - len(ids)
        self.engine.ranks.look()
        short = missing - allocator.available_size()
        if short > 0:
            cache.evict(EvictParams(num_tokens=short))
        fresh = allocator.alloc(missing) if allocator.available_size() >= missing else None
        if fresh is None:
            self._unlock(request)
            return
        tell(self.engine)
        request.ids = torch.cat([ids, fresh])
        self.running.append(request)

    def end(self, request: Running) -> None:
        """Let a request end: what it computed is cached."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        self.running.remove(request)
        key = RadixKey(array("q", request.tokens), None)
        self.cache.insert(
            InsertParams(key=key, value=request.ids, prev_prefix_len=request.num_kept)
        )
        self._unlock(request)

    def retract(self, request: Running) -> None:
        """Send a request back to the queue: what it computed is lost."""
        self.running.remove(request)
        self.allocator.free(request.ids[request.num_kept :])
        self._unlock(request)

    def give(self, num_pages: int, num_owed: int = 0) -> None:
        """Let a neighbour ask for pages."""
        self.engine.giving.give(WantedPages(num_pages, num_owed))
        self.engine.giving.owed_pages = 0
        tell(self.engine)

    def flush(self) -> None:
        """Forget the whole cache; no request runs."""
        self.cache.reset()
        self.allocator.clear()

    def sleep(self) -> None:
        """Release the memory: SGLang flushes, then all pages but page 0 go."""
        self.flush()
        self.engine.empty()

    def report(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Return what is cached."""
        return report_of(self.cache, prompts)

    def close(self) -> None:
        """Leave nothing behind."""
        self._publisher.shutdown()
        self.mirror.close()
        pool = self.allocator.get_kvcache()
        pool.k_buffer.clear()
        pool.v_buffer.clear()
        assert self.engine.memory is not None
        self.engine.memory.close()
        self.engine.close()

    def _unlock(self, request: Running) -> None:
        params = request.lock.to_dec_params() if hasattr(request.lock, "to_dec_params") else None
        self.cache.dec_lock_ref(request.node, *(() if params is None else (params,)))


def _make_cache(params: Any) -> Any:
    """Return the cache that a server of this release has."""
    try:
        from sglang.srt.mem_cache.rust_tree_core import adapter  # noqa: F401
    except ImportError:
        from sglang.srt.mem_cache.radix_cache import RadixCache

        return RadixCache(params)
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    params.tree_components = (ComponentType.FULL,)
    return UnifiedRadixCache(params)
