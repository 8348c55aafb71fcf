"""vLLM's own manager and block pool under our engine, with workers of one rank and no model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from queue import Queue
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from vllm import SamplingParams
from vllm.v1.core import kv_cache_coordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request as VllmRequest

from helpers.configurations import configuration
from helpers.held_weights import HeldWeights
from helpers.served import NUM_WEIGHT_PAGES, Request, Served
from helpers.waiting import PATIENCE_SECONDS
from kvcached_core.config import Config, WeightsMode
from kvcached_core.memory.devices import host_device
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_vllm import engine_hooks
from kvcached_vllm.elastic_weights import OURS
from kvcached_vllm.engine import VllmEngine
from kvcached_vllm.engine_hooks import ORDERS
from kvcached_vllm.layout import PLACEMENT
from kvcached_vllm.sleeping import asleep_bytes

BLOCK_TOKENS = 16
BLOCK_BYTES = 65536
NUM_PLANES = 4  # 8 blocks a page


def hash_of(value: Any) -> bytes:
    """Return a hash of a block's tokens, as vLLM wants one."""
    return hash(str(value)).to_bytes(16, "little", signed=True)


class VllmServed(Served):
    """The engine under test: it stands for vLLM's core, its scheduler and its executor.

    Its block manager is vLLM's own, and so is our block pool in it; our hooks are on all of them.
    """

    engine: VllmEngine
    block_tokens = BLOCK_TOKENS

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        device = host_device(config)
        num_blocks = device.total_bytes // (NUM_PLANES * BLOCK_BYTES)
        self._wakes: Queue[Any] = Queue()
        self._idle_state_callbacks: list[Callable[[Any], None]] = []
        self.input_queue = SimpleNamespace(put_nowait=self._wakes.put)
        self.model_executor = self.scheduler = self
        self.kv_event_publisher = SimpleNamespace(publish=lambda _batch: None)
        self.is_sleeping = False
        self._bytes_to_wake = 0
        model = SimpleNamespace(model="m", max_model_len=num_blocks * BLOCK_TOKENS)
        self.engine = VllmEngine(configuration(model_config=model), config, [device], self)
        self.kvcached: Any = self.engine  # where our hooks look for it
        tensors = [SimpleNamespace(size=BLOCK_BYTES * num_blocks) for _ in range(NUM_PLANES)]
        spec = SimpleNamespace(
            block_size=BLOCK_TOKENS, page_size_bytes=1, max_memory_usage_bytes=lambda _config: 0
        )
        groups = [SimpleNamespace(kv_cache_spec=spec)]
        plan = SimpleNamespace(
            kv_cache_tensors=tensors, num_blocks=num_blocks, kv_cache_groups=groups
        )
        backend = HostBackend()
        self.engine.place([plan], backend.granularity_bytes)
        place = getattr(plan, PLACEMENT)
        self.memory = RankMemory(place.geometry, place.num_pages, place.seat, backend)
        self._worker = SimpleNamespace(kvcached=self.memory)
        if config.weights is WeightsMode.YIELD:
            self.weights = HeldWeights(NUM_WEIGHT_PAGES, place.seat, config)
            setattr(self._worker, OURS, SimpleNamespace(rank=self.weights.rank))
        self._hooks = ExitStack()
        self._hooks.enter_context(hooked())
        self.kv_cache_manager = self._build_manager(num_blocks)

    def _build_manager(self, num_blocks: int) -> Any:
        spec = FullAttentionSpec(
            block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32
        )
        num_tokens = num_blocks * BLOCK_TOKENS
        options = {
            "max_model_len": num_tokens,
            "max_num_batched_tokens": num_tokens,
            "max_in_flight_tokens": num_tokens,
            "scheduler_block_size": BLOCK_TOKENS,
            "hash_block_size": BLOCK_TOKENS,
            "enable_caching": True,
        }
        known = signature(KVCacheManager.__init__).parameters
        init_none_hash(hash_of)
        plan = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        plan.kvcached = self.engine
        return KVCacheManager(
            plan,
            **{name: value for name, value in options.items() if name in known},
        )

    def allocate(self, request: Request, num_blocks: int) -> bool:
        """See `Served.allocate`."""
        if request.of_engine is None:
            number = len(self._marks) + 1
            tokens = [number] * (num_blocks * BLOCK_TOKENS)
            hasher = get_request_block_hasher(BLOCK_TOKENS, hash_of)
            options = {"prompt_token_ids": tokens, "pooling_params": None, "block_hasher": hasher}
            known = signature(VllmRequest.__init__).parameters
            request.of_engine = VllmRequest(
                request.name,
                sampling_params=SamplingParams(max_tokens=1),
                **{name: value for name, value in options.items() if name in known},
            )
        request.of_engine.num_computed_tokens = request.num_held * BLOCK_TOKENS
        blocks = self.kv_cache_manager.allocate_slots(
            request.of_engine,
            num_blocks * BLOCK_TOKENS,
            delay_cache_blocks=not request.is_cached,
        )
        return blocks is not None

    def free(self, request: Request) -> None:
        """See `Served.free`."""
        self.kv_cache_manager.free(request.of_engine)
        request.of_engine = None

    def block_ids(self, request: Request) -> list[int]:
        """See `Served.block_ids`."""
        (ids,) = self.kv_cache_manager.get_block_ids(request.name)
        return [int(block) for block in ids]

    def begin_schedule(self) -> None:
        """See `Served.begin_schedule`: there is nothing to do."""

    def end_schedule(self, step: Callable[[], None]) -> None:
        """See `Served.end_schedule`: the orders ride on the schedule's output."""
        schedule = engine_hooks.scheduler_schedule(lambda _scheduler: SimpleNamespace())
        orders = getattr(schedule(self), ORDERS, None)
        if orders is not None:
            self.memory.before_step(orders)
        step()
        if orders is not None:
            self.memory.after_step(orders)
        engine_hooks.engine_core_post_step(lambda _core: None)(self)
        if not self.has_requests:
            self._run_callbacks()

    def heed(self) -> None:
        """See `Served.heed`."""
        self._wakes.get(timeout=PATIENCE_SECONDS)
        self._run_callbacks()

    def sleep(self) -> None:
        """See `Served.sleep`."""
        engine_hooks.executor_sleep(lambda _executor, _level: None)(self)
        self.is_sleeping = True

    @contextmanager
    def waking(self, num_bytes: int) -> Iterator[None]:
        """See `Served.waking`."""
        self._bytes_to_wake = num_bytes
        num_bytes = max(self.collective_rpc(asleep_bytes, args=(None,)))
        with self.engine.room_to_wake(num_bytes, has_weights=self.engine.yields_weights):
            yield
        self.is_sleeping = False

    def close(self) -> None:
        """See `Served.close`."""
        self._hooks.close()
        self.memory.close()
        if self.weights is not None:
            self.weights.close()
        engine_hooks.engine_core_shutdown(lambda _core: None)(self)

    def has_unfinished_requests(self) -> bool:
        """See vLLM's scheduler."""
        return self.has_requests

    def get_request_counts(self) -> tuple[int, int]:
        """See vLLM's scheduler."""
        return len(self.running), len(self.waiting)

    def collective_rpc(self, function: Any, args: tuple[Any, ...] = ()) -> list[Any]:
        """See vLLM's executor; there is no allocator of its own that would say what sleeps."""
        if function is asleep_bytes:
            return [self._bytes_to_wake]
        return [function(self._worker, *args)]

    def _run_callbacks(self) -> None:
        while self._idle_state_callbacks:
            self._idle_state_callbacks.pop(0)(self)


@contextmanager
def hooked() -> Iterator[None]:
    """Let vLLM's classes have our hooks, as far as blocks are concerned."""
    with ExitStack() as stack:
        for owner, name, hook in (
            (KVCacheManager, "__init__", engine_hooks.kv_cache_manager_init),
            (KVCacheManager, "allocate_slots", engine_hooks.kv_cache_manager_allocate_slots),
            (kv_cache_coordinator, "BlockPool", engine_hooks.block_pool_factory),
        ):
            stack.enter_context(patch.object(owner, name, hook(getattr(owner, name))))
        yield
