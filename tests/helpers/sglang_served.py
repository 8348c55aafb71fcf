"""SGLang's own KV pool and allocator under our engine, with a prefix cache that is only a queue."""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch

from helpers.fake_weights import FakeWeights
from helpers.served import Request, Served
from helpers.sglang_elastic import make_allocator
from kvcached_core.config import Config
from kvcached_core.memory.devices import host_device
from kvcached_core.weights.status import WeightStatus
from kvcached_sglang.elastic_weights import begin_to_yield
from kvcached_sglang.engine import SglangEngine

NUM_LAYERS = 2
NUM_WEIGHTS = 4
NUM_HEADS, HEAD_DIM = 2, 8192
BLOCK_BYTES = NUM_HEADS * HEAD_DIM * 4  # float32; with keys and values of two layers 8 in a page


class Cache:
    """A prefix cache of which no request holds anything: the first that came goes first."""

    def __init__(self, free: Callable[[torch.Tensor], None]) -> None:
        self.tokens: deque[int] = deque()
        self._free = free

    def supports_mamba(self) -> bool:
        """See SGLang's caches."""
        return False

    def supports_swa(self) -> bool:
        """See SGLang's caches."""
        return False

    def evictable_size(self) -> int:
        """See SGLang's caches."""
        return len(self.tokens)

    def evict(self, params: Any) -> None:
        """See SGLang's caches."""
        number = min(params.num_tokens, len(self.tokens))
        self._free(torch.tensor([self.tokens.popleft() for _ in range(number)]))


class FakeRank:
    """What of a rank's weights the adapter knows."""

    def __init__(self, weights: FakeWeights) -> None:
        self._weights = weights
        self.hold = weights.hold

    def status(self) -> WeightStatus:
        """See `RankWeights.status`."""
        return self._weights.status

    def begin_copy(self) -> None:
        """See `RankWeights.begin_copy`: there is one already."""


class SglangServed(Served):
    """The engine under test: it stands for SGLang's scheduler; a block is one token."""

    engine: SglangEngine

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        arguments = SimpleNamespace(
            served_model_name="m", model_path="m", max_prefill_tokens=1 << 20, load_format="auto"
        )
        num_tokens = host_device(config).total_bytes // (2 * NUM_LAYERS * BLOCK_BYTES) - 1
        self.engine = SglangEngine(torch.device("cpu"), arguments, 4, config)
        self._allocator = make_allocator(
            self.engine, num_tokens, layer_num=NUM_LAYERS, head_num=NUM_HEADS, head_dim=HEAD_DIM
        )
        self._pool = self._allocator.get_kvcache()
        assert self.engine.memory is not None
        self.memory = self.engine.memory
        self._cache = Cache(self._allocator.free)
        self._scheduler = SimpleNamespace(
            running_batch=SimpleNamespace(reqs=self.running, batch_is_full=False),
            last_batch=None,
            chunked_req=None,
            waiting_queue=[],
            tree_cache=self._cache,
        )
        self.engine.port.scheduler = self._scheduler
        if self.engine.may_yield:
            self.weights = FakeWeights(NUM_WEIGHTS, self.engine.ranks.seat, config)
            self.engine.port.weights = FakeRank(self.weights)  # type: ignore[assignment]
            begin_to_yield(self.engine, SimpleNamespace())

    def send(self, name: str, num_pages: int, *, is_cached: bool = False) -> None:
        """See `Served.send`; the engine's longest request is the longest that a test sends.

        An engine that stalls waits for that. One as long as the pool would refuse lower limits.
        """
        placing = self.engine.placing
        placing.least_pages = max(placing.least_pages, num_pages)
        super().send(name, num_pages, is_cached=is_cached)

    @property
    def may_admit(self) -> bool:
        """See `Served.may_admit`."""
        return not self.engine.must_hold()

    def allocate(self, request: Request, num_blocks: int) -> bool:
        """See `Served.allocate`: SGLang looks whether there is enough, evicts, and takes it."""
        if not self._has(num_blocks):
            self.engine.pay()  # as our hook does when SGLang stops requests
            if not self._has(num_blocks):
                return False
        ids = self._allocator.alloc(num_blocks)
        assert ids is not None, "an allocation that fails ends SGLang"
        held = [] if request.of_engine is None else [request.of_engine]
        request.of_engine = torch.cat([*held, ids])
        return True

    def _has(self, num_tokens: int) -> bool:
        """Return whether there is as much, as SGLang finds out: it evicts what is missing first."""
        missing = num_tokens - self._allocator.available_size()
        if 0 < missing <= self._cache.evictable_size():
            self._cache.evict(SimpleNamespace(num_tokens=missing))
        return bool(self._allocator.available_size() >= num_tokens)

    def free(self, request: Request) -> None:
        """See `Served.free`."""
        ids, request.of_engine = request.of_engine, None
        if request.is_cached:
            self._cache.tokens.extend(ids.tolist())
        else:
            self._allocator.free(ids)

    def block_ids(self, request: Request) -> list[int]:
        """See `Served.block_ids`."""
        return [int(block) for block in request.of_engine]

    def begin_schedule(self) -> None:
        """See `Served.begin_schedule`."""
        self._scheduler.waiting_queue = [
            SimpleNamespace(
                origin_input_ids=[7] * (self.num_blocks_of(request) - 1),  # it counts one more
                output_ids=[],
                sampling_params=SimpleNamespace(max_new_tokens=0),
            )
            for request in self.waiting
        ]
        self.engine.before_schedule()

    def end_schedule(self, step: Callable[[], None]) -> None:
        """See `Served.end_schedule`: what waits for a step's launches begins behind it."""
        self._scheduler.waiting_queue = list(self.waiting)
        self.engine.after_schedule(has_batch=bool(self.running))
        step()
        self.engine.port.carry_out_later()

    def heed(self) -> None:
        """See `Served.heed`: SGLang's loop never sleeps, and looks in its next turn."""
        self.turn()

    def sleep(self) -> None:
        """See `Served.sleep`."""
        self.engine.sleep()

    def waking(self, num_bytes: int) -> AbstractContextManager[None]:
        """See `Served.waking`."""
        return self.engine.room_to_wake(num_bytes, has_weights=True)

    def close(self) -> None:
        """See `Served.close`."""
        self._pool.k_buffer.clear()
        self._pool.v_buffer.clear()
        super().close()
