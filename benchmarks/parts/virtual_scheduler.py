"""The part of vLLM's scheduler that matters where memory is short, in virtual time."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from parts.virtual_time import clock

BLOCK_TOKENS = 32
IDLE_SECONDS = 0.005  # until a scheduler looks again that could do nothing


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        prompt: Its tokens.
        num_wanted: After how many parts of the answer its client has enough.
        is_whole: Whether that is all of it.
        client: Whose it is.
        at_seconds: When it came.
    """

    prompt: list[int]
    num_wanted: int
    is_whole: bool = True
    client: int = 0
    at_seconds: float = 0.0


class Source(Protocol):
    """Where requests come from."""

    def due(self, seconds: float) -> Iterable[Ask]:
        """Return what has come by now, each request once."""

    def began(self, ask: Ask, seconds: float) -> None:
        """Hear that the first token of a request has come."""

    def ended(self, ask: Ask, seconds: float) -> None:
        """Hear that a request has all that it wants."""


@dataclass(frozen=True)
class Sizes:
    """What a scheduler is made of.

    Attributes:
        max_tokens: Of a request with its answer.
        max_batch_tokens: Of a step.
        max_running: Requests at a time.
        step_seconds: What a step takes, whatever is in it.
        token_seconds: What each of its tokens takes beside.
        is_caching: Whether prefixes are kept.
    """

    max_tokens: int
    max_batch_tokens: int
    max_running: int
    step_seconds: float
    token_seconds: float
    is_caching: bool


@functools.cache
def hasher() -> Any:
    """Return what hashes the blocks of a prompt."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    init_none_hash(sha256)
    return get_request_block_hasher(BLOCK_TOKENS, sha256)


def make_manager(num_blocks: int, sizes: Sizes, engine: Any = None) -> Any:
    """Return vLLM's manager, over its own pool or over that of an elastic engine."""
    import torch
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(
        block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    plan: Any = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    if engine is not None:
        plan.kvcached = engine
    return KVCacheManager(
        plan,
        max_model_len=sizes.max_tokens,
        scheduler_block_size=BLOCK_TOKENS,
        hash_block_size=BLOCK_TOKENS,
        enable_caching=sizes.is_caching,
    )


def play(schedulers: Sequence["Scheduler"], goes_on: Callable[[float], bool]) -> None:
    """Let schedulers make their steps side by side, then close them.

    Args:
        schedulers: Whoever is behind makes the next step.
        goes_on: Whether one more step is made; told when that would begin.
    """
    try:
        while goes_on((following := min(schedulers, key=lambda one: one.at)).at):
            clock.seconds = max(clock.seconds, following.at)
            following.step()
    finally:
        for one in schedulers:
            one.close()


class Scheduler:
    """The part of vLLM's scheduler that matters here: first come, first served, in chunks.

    Attributes:
        at: When its next step begins.
        counts: What came of it.

    Args:
        side: Its name.
        sizes: How much it does at a time, and what that takes.
        source: Where its requests come from.
    """

    def __init__(self, side: str, sizes: Sizes, source: Source) -> None:
        self.side, self.sizes = side, sizes
        self.at = clock.seconds
        self.waiting: list[Any] = []
        self.running: list[Any] = []
        names = ("answers", "broken_off", "preemptions", "prompt_tokens", "found_in_the_cache")
        self.counts = dict.fromkeys((*names, "mapped_pages", "unmapped_pages"), 0)
        self.kv_cache_manager: Any = None
        self._source = source
        self._num_sent = 0

    def begin(self, manager: Any) -> None:
        """Have a manager from now on."""
        self.kv_cache_manager = manager

    def has_unfinished_requests(self) -> bool:
        """Stand for vLLM's."""
        return bool(self.waiting or self.running)

    def get_request_counts(self) -> tuple[int, int]:
        """Stand for vLLM's."""
        return len(self.running), len(self.waiting)

    def step(self) -> None:
        """Make a step, and set when the next one begins."""
        self._receive()
        scheduled = self._schedule()
        num_tokens = sum(num for _, num in scheduled)
        seconds = self.sizes.step_seconds + self.sizes.token_seconds * num_tokens
        self.at += (seconds if scheduled else IDLE_SECONDS) + self.end_schedule()
        for request, num in scheduled:
            request.num_computed_tokens += num
            if request.num_computed_tokens >= request.num_tokens:
                request.append_output_token_ids(7)
                if request.num_output_tokens == 1:
                    self._source.began(request.ask, self.at)
            if request.num_output_tokens >= request.ask.num_wanted:
                self._end(request)
        self.at += self.between_steps()

    def end_schedule(self) -> float:
        """Carry out what the schedule decided; return the seconds that it takes."""
        return 0.0

    def between_steps(self) -> float:
        """Answer neighbours; return the seconds that it takes."""
        return 0.0

    def close(self) -> None:
        """Leave what it shares with others: nothing here."""

    def _end(self, request: Any) -> None:
        self.running.remove(request)
        self.kv_cache_manager.free(request)
        self.counts["answers" if request.ask.is_whole else "broken_off"] += 1
        self._source.ended(request.ask, self.at)
        self._receive()

    def _receive(self) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        for ask in self._source.due(self.at):
            self._num_sent += 1
            sampling = SamplingParams(max_tokens=self.sizes.max_tokens, ignore_eos=True)
            name = f"{self.side}-{self._num_sent}"
            request: Any = Request(name, ask.prompt, sampling, None, block_hasher=hasher())
            request.ask = ask
            self.waiting.append(request)

    def _schedule(self) -> list[tuple[Any, int]]:
        """Return what is computed in this step, and how many tokens of each."""
        found: list[tuple[Any, int]] = []
        budget, has_preempted = self.sizes.max_batch_tokens, False
        for request in list(self.running):
            if request not in self.running or not budget:
                break
            num = min(request.num_tokens - request.num_computed_tokens, budget)
            while self.kv_cache_manager.allocate_slots(request, num) is None:
                has_preempted = True
                if self._preempt() is request:
                    num = 0
                    break
            if num:
                found.append((request, num))
                budget -= num
        found = [(request, num) for request, num in found if request in self.running]
        return found if has_preempted else [*found, *self._let_in(budget)]

    def _preempt(self) -> Any:
        from vllm.v1.request import RequestStatus

        last = self.running.pop()
        self.kv_cache_manager.free(last)
        last.status, last.num_computed_tokens = RequestStatus.PREEMPTED, 0
        self.waiting.insert(0, last)
        self.counts["preemptions"] += 1
        return last

    def _let_in(self, budget: int) -> list[tuple[Any, int]]:
        from vllm.v1.request import RequestStatus

        found = []
        while self.waiting and budget and len(self.running) < self.sizes.max_running:
            request, manager = self.waiting[0], self.kv_cache_manager
            blocks, num_cached, *_ = manager.get_computed_blocks(request)
            num = min(request.num_tokens - num_cached, budget)
            words = {"full_sequence_must_fit": True, "has_scheduled_reqs": bool(self.running)}
            if manager.allocate_slots(request, num, num_cached, blocks, **words) is None:
                break
            self.running.append(self.waiting.pop(0))
            request.status, request.num_computed_tokens = RequestStatus.RUNNING, num_cached
            self.counts["prompt_tokens"] += request.num_tokens
            self.counts["found_in_the_cache"] += num_cached
            found.append((request, num))
            budget -= num
        return found
