"""Copies between the KV cache and the host that HiCache has begun and not acknowledged yet.

SGLang locks a node of its cache while a copy of it is open, so its blocks are not free and their
pages not empty. It forgets both at a reset, where a copy would go on. The pages are held, too.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from kvcached_sglang.host_tier import (
    copied_ids,
    disk_folders,
    host_pools,
    other_host_pools,
)

if TYPE_CHECKING:
    from kvcached_core.weights.counted_tier import CountedTier
    from kvcached_sglang.engine import SglangEngine


@dataclass(frozen=True)
class Copy:
    """One copy, of the blocks of several nodes: what it holds pages as, and what it is counted by.

    Attributes:
        number: Its holder.
        num_ids: The ids that it names of each of our pools, those of tokens first.
        num_bytes: What it copies, on all ranks.
        began_at: When it was begun, in seconds.
    """

    number: int
    num_ids: Mapping[int, int]
    num_bytes: int
    began_at: float


class OpenCopies:
    """The copies of one scheduler. Its thread calls it; what a call does every rank does alike.

    Args:
        engine: The engine.
        tier: What counts the copies, on the rank that has it.
        clock: Returns seconds.
    """

    def __init__(
        self,
        engine: "SglangEngine",
        tier: "CountedTier | None",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._tier = tier
        self._num_parts = 1.0  # of this rank's size that all have together, from `meet` on
        self._clock = clock
        self._numbers = count()
        self._controller: Any = None
        self._stores: list[Copy] = []
        self._loads: list[Copy] = []
        self._locked: list[tuple[Copy, int]] = []  # that have ended, and the last one begun by then

    def __bool__(self) -> bool:
        return bool(self._stores or self._loads)

    def num_locked(self, pool: int) -> int:
        """Return how many ids of one of our pools copies to the host lock.

        A request waits for those that are loaded. A copy locks all tokens that lie above its node
        in the tree: that of an answer its prompt, whose own copy was begun before and may have
        ended. So that counts until none is open which was. Of a window's tokens, and of states, it
        locks about what it names.
        """
        ended = [copy for copy, _ in self._locked] if pool == 0 else []
        return sum(copy.num_ids.get(pool, 0) for copy in (*self._stores, *ended))

    def meet(self, controller: Any) -> None:
        """Learn what all ranks have of a token on the host, and take room for that of drafts.

        All ranks call it at the start: stages differ in what they have, and SGLang's setting is the
        size of the target alone.

        Args:
            controller: SGLang's, when all of its pools are there.
        """
        pools = list(host_pools(controller))
        own_bytes = sum(int(pool.size_per_token) for pool in pools)
        draft_bytes = sum(int(pool.size) * int(pool.size_per_token) for pool in pools[1:])
        all_bytes, draft_bytes = self._engine.ranks.add_up([own_bytes, draft_bytes])
        self._num_parts = all_bytes / own_bytes
        if draft_bytes and self._tier is not None:
            self._tier.grow(draft_bytes)

    def store(self, controller: Any, start: Callable[[], Any]) -> None:
        """Have SGLang begin to copy what it has queued to the host; hold what that reads."""
        self._see(controller)
        operations, num_before = list(controller.write_queue), len(controller.ack_write_queue)
        self._check(operations)
        start()
        if len(controller.ack_write_queue) > num_before:
            self._stores.append(self._begin(operations, controller.ack_write_queue[-1]))

    def load(self, controller: Any, start: Callable[[], Any]) -> Any:
        """Have SGLang begin to copy what it has queued to the device; hold what that writes.

        The pages are mapped now, and no zero comes behind what is loaded: the copy waits for no
        stream of ours.
        """
        self._see(controller)
        operations, num_before = list(controller.load_queue), len(controller.ack_load_queue)
        self._engine.map_for_copies()
        self._check(operations)
        answer = start()
        if len(controller.ack_load_queue) > num_before:
            self._loads.append(self._begin(operations, controller.ack_load_queue[-1]))
            if self._tier is not None:
                for operation in operations:
                    self._tier.hit(len(operation.host_indices))
        return answer

    def settle(self) -> None:
        """Let go of the copies that SGLang has acknowledged since: it does so in their order."""
        if not self:
            return
        controller, tier = self._controller, self._tier
        has_ended = False
        for copies, open_ones in (
            (self._stores, controller.ack_write_queue),
            (self._loads, controller.ack_load_queue),
        ):
            ended = copies[: len(copies) - len(open_ones)]
            del copies[: len(ended)]
            has_ended |= bool(ended)
            if copies is self._stores:
                self._unlock(ended)
            for copy in ended:
                self._engine.release(copy.number)
                if tier is not None:
                    note = tier.stored if copies is self._stores else tier.loaded
                    note(copy.num_bytes, self._clock() - copy.began_at)
        if has_ended and tier is not None:
            tier.tell(is_last=not self, held_bytes=self._held_bytes())

    def look(self, tree_cache: Any) -> None:
        """Have SGLang acknowledge the copies that have ended.

        Older releases do so only where they let requests in, and none may come in while a neighbour
        waits for what copies lock. Several ranks count together what has ended on all of them, so
        one that has begun no copy comes, too.
        """
        if self or self._engine.ranks.is_one_of_many:
            tree_cache.writing_check()
            tree_cache.loading_check()

    def finish(self, tree_cache: Any) -> bool:
        """Wait for all copies, and have SGLang acknowledge them; return whether there were any.

        Several ranks do so as in `look`, and there may have been some on another one.
        """
        controller = tree_cache.cache_controller
        controller.start_writing()
        if not self._wait(controller) and not self._engine.ranks.is_one_of_many:
            return False
        tree_cache.writing_check()
        tree_cache.loading_check()
        self.settle()
        return True

    def reset(self, controller: Any) -> None:
        """Wait for all copies, and forget them: SGLang is about to forget all that it stored."""
        self._wait(controller)
        for copy in (*self._stores, *self._loads):
            self._engine.release(copy.number)
        self._stores, self._loads, self._locked = [], [], []
        if self._tier is not None:
            self._tier.reset()

    def _unlock(self, ended: list[Copy]) -> None:
        if self._stores:
            first, last = self._stores[0].number, self._stores[-1].number
            self._locked += [(copy, last) for copy in ended]
            self._locked = [each for each in self._locked if each[1] >= first]
        else:
            self._locked = []

    def _see(self, controller: Any) -> None:
        self._controller = controller
        if self._tier is not None:
            self._tier.token_bytes = self._token_bytes()
            self._tier.folders = disk_folders(controller)

    def _wait(self, controller: Any) -> bool:
        acknowledgements = [*controller.ack_write_queue, *controller.ack_load_queue]
        for each in acknowledgements:
            each.finish_event.synchronize()
        return bool(acknowledgements)

    def _begin(self, operations: list[Any], acknowledgement: Any) -> Copy:
        number, num_ids = next(self._numbers), {}
        for pool, ids in self._named(operations):
            self._engine.hold(ids, number, pool)
            num_ids[pool] = sum(map(len, ids))
        num_bytes = int(getattr(acknowledgement, "num_bytes", 0) * self._num_parts)
        num_bytes = num_bytes or num_ids.get(0, 0) * self._token_bytes()  # older ones do not say it
        return Copy(number, num_ids, num_bytes, self._clock())

    def _check(self, operations: list[Any]) -> None:
        if self._engine.config.debug:
            for pool, ids in self._named(operations):
                for each in ids:
                    self._engine.check_copied(each, pool)

    def _named(self, operations: list[Any]) -> Iterator[tuple[int, list[Any]]]:
        """Yield what copies name of each of our pools."""
        for name, ids in copied_ids(operations).items():
            pool = self._engine.pool_of(name)
            if pool is not None:
                yield pool, ids

    def _token_bytes(self) -> int:
        own_bytes = sum(int(pool.size_per_token) for pool in host_pools(self._controller))
        return round(own_bytes * self._num_parts)

    def _held_bytes(self) -> int:
        keys = next(host_pools(self._controller))
        others = sum(
            int(pool.size - pool.available_size()) * int(pool.size_per_token)
            for pool in other_host_pools(self._controller)
        )
        num_held = int(keys.size - keys.available_size())
        return num_held * self._token_bytes() + int(others * self._num_parts)
