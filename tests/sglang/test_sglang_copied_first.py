"""Of SGLang's cache a neighbour gets first what the host tier has, in SGLang's own order."""

import heapq
from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_sglang.copied_first import drop

pytestmark = pytest.mark.sglang


class Node:
    """A leaf, of one token."""

    def __init__(self, name: str, *, backuped: bool) -> None:
        self.name, self.backuped = name, backuped


class Cache:
    """A cache of leaves, the longest unused first; it notes what goes.

    Args:
        copied: Those that the host tier has, too, of the leaves a to f.
    """

    def __init__(self, copied: str) -> None:
        self.leaves = {name: Node(name, backuped=name in copied) for name in "abcdef"}
        self.gone = ""
        self.cache_controller: Any = object()

    def _go(self, name: str) -> None:
        del self.leaves[name]
        self.gone += name


class WalkingCache(Cache):
    """A tree as newer releases have it, which shows leaf after leaf."""

    def is_backuped(self, name: str) -> bool:
        return self.leaves[name].backuped

    def _evict_device_leaf(self, name: str, tracker: list[str]) -> None:
        self._go(name)
        tracker.append(name)

    def evict(self, params: Any) -> Any:
        tracker: list[str] = []
        for name in list(self.leaves):
            if len(tracker) >= params.num_tokens:
                break
            self._evict_device_leaf(name, tracker)
        return SimpleNamespace(num_tokens_evicted=len(tracker))


class SortingCache(Cache):
    """A tree as older releases have it, which sorts leaves by a strategy."""

    def __init__(self, copied: str) -> None:
        super().__init__(copied)
        self.eviction_strategy = SimpleNamespace(get_priority=lambda node: ord(node.name))

    def evict(self, params: Any) -> Any:
        heap = [
            (self.eviction_strategy.get_priority(node), name) for name, node in self.leaves.items()
        ]
        heapq.heapify(heap)
        num_evicted = 0
        while heap and num_evicted < params.num_tokens:
            self._go(heapq.heappop(heap)[1])
            num_evicted += 1
        return SimpleNamespace(num_tokens_evicted=num_evicted)


@pytest.mark.parametrize("kind", [WalkingCache, SortingCache])
@pytest.mark.parametrize(
    ("copied", "num_tokens", "gone"),
    [("bdf", 2, "bd"), ("bdf", 4, "bdfa"), ("", 2, "ab"), ("abcdef", 3, "abc"), ("f", 9, "fabcde")],
)
def test_what_the_host_tier_has_goes_first(
    kind: type[Any], copied: str, num_tokens: int, gone: str
) -> None:
    cache = kind(copied)
    drop(cache, num_tokens)
    assert cache.gone == gone


@pytest.mark.parametrize("kind", [WalkingCache, SortingCache])
def test_what_sglang_takes_itself_stays_in_its_order(kind: type[Any]) -> None:
    cache = kind("bdf")
    drop(cache, 1)
    cache.evict(SimpleNamespace(num_tokens=2))
    assert cache.gone == "bac"


@pytest.mark.parametrize("kind", [WalkingCache, SortingCache])
def test_without_a_host_tier_the_order_is_sglangs(kind: type[Any]) -> None:
    cache = kind("bdf")
    cache.cache_controller = None
    drop(cache, 3)
    assert cache.gone == "abc"
