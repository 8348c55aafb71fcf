"""What SGLang serves at once it serves at once with us, too: the same tokens, and nothing stays."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.hicache_server import TIER
from helpers.sglang_drafts import (
    eagle3_head,
    eagle_head,
    embedding_draft,
    noised_copy,
    quiet_copy,
    quiet_target,
)
from helpers.sglang_engine import Models
from helpers.sglang_models import qwen3_moe, small_laguna, small_lfm2
from helpers.sglang_together import Answer, Together, together
from helpers.speculating_server import ATTENTION
from helpers.spoiled_planes import TARGET
from helpers.waiting import await_that

from kvcached_core.units import MIB

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.every_release,
    pytest.mark.timeout(600),
]

ATTENTION_RANKS = ("--tp-size", "2", "--attn-dp-size", "2", *ATTENTION)
RANKS, STAGES = ("--dp-size", "2"), ("--pp-size", "2")
TWO_POOLS = ("--attention-backend", "triton", "--triton-attention-num-kv-splits", "1")
CHAIN = (
    *("--speculative-num-draft-tokens", "4"),
    *("--speculative-num-steps", "3", "--speculative-eagle-topk", "1"),
    *ATTENTION,
)
NGRAM = (
    *("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "4"),
    *ATTENTION,
)
# What comes back is read from disk: the host's memory keeps nothing.
ON_DISK = ("--page-size", "16", "--hicache-storage-prefetch-policy", "wait_complete")
THROUGH_DISK = (
    *(*ON_DISK, "--hicache-storage-backend", "file"),
    *("--hicache-host-memory-mode", "buffer_only"),
)
NAMED_STORAGE = {
    "backend_name": "named",
    "module_path": "helpers.hicache_storage",
    "class_name": "NamedStorage",
}
THROUGH_NAMED = (
    *(*ON_DISK, "--hicache-storage-backend", "dynamic"),
    *("--hicache-storage-backend-extra-config", json.dumps(NAMED_STORAGE)),
    *("--hicache-host-memory-mode", "buffer_only"),
)
BY_RATIO = ("--enable-hierarchical-cache", "--hicache-mem-layout", "layer_first")
COPIER, KERNELS = "helpers.hicache_plugin", "helpers.spoiled_planes"
DRAFTS = {"STANDALONE": noised_copy, "EAGLE": eagle_head, "EAGLE3": eagle3_head}


@dataclass(frozen=True)
class Combination:
    """Settings that are served at once.

    Attributes:
        arguments: SGLang's.
        make: Makes a model; None for a tiny Llama.
        draft: What SGLang calls the draft that goes with it; empty without one.
        num_processes: Its ranks.
        num_instances: Those that share nothing.
        num_prompts: What each of those is asked.
        num_tokens: Tokens of a prompt.
        num_first_pages: Those that a rank never gives: that of states is one of its own.
        num_more: Tokens that are put behind a prompt; without any the answer repeats what was said.
        pools: What SGLang calls those that are copied to the host.
        num_blocks: Those of the prompts that are stored on disk.
        host_bytes: What it takes of the host for copies; 0 where it is told that.
    """

    arguments: tuple[str, ...]
    make: Callable[[], Any] | None = None
    draft: str = ""
    num_processes: int = 2
    num_instances: int = 1
    num_prompts: int = 3
    num_tokens: int = 200
    num_first_pages: int = 1
    num_more: int = 8
    pools: tuple[str, ...] = ()
    num_blocks: int = 0
    host_bytes: int = 0

    @property
    def has_ngrams(self) -> bool:
        """Whether it drafts without a model."""
        return "NGRAM" in self.arguments

    @property
    def is_spoiled_by_plane(self) -> bool:
        """Whether keys of one model, and of no host pool, are what a test spoils."""
        return not self.pools and (self.has_ngrams or bool(self.draft))

    @property
    def has_tier(self) -> bool:
        """Whether blocks are copied to the host."""
        return bool(self.pools)

    def prompts(self, num_more: int = 0) -> list[list[int]]:
        """Return prompts for all ranks; the same ones with so much more behind."""
        source = random.Random(1)
        number = self.num_prompts * self.num_instances
        prompts = [self._tokens(source, self.num_tokens) for _ in range(number)]
        return [prompt + self._tokens(source, num_more) for prompt in prompts]

    def _tokens(self, source: random.Random, number: int) -> list[int]:
        return [source.randrange(3, 500) for _ in range(number)]


WINDOW = partial(Combination, make=small_laguna, num_tokens=40)
STATES = partial(Combination, make=small_lfm2, num_tokens=40, num_first_pages=2)
TOGETHER = partial(Combination, make=qwen3_moe, num_instances=2)
COMBINATIONS = {
    "ranks-draft-tier": Combination(
        (*RANKS, *TIER), draft="STANDALONE", num_instances=2, pools=("kv",)
    ),
    "ranks-window": WINDOW((*RANKS, *TWO_POOLS), num_instances=2),
    "ranks-states": STATES(RANKS, num_instances=2),
    "stages-tier": Combination((*STAGES, *TIER), pools=("kv",)),
    "stages-draft-tier": Combination((*STAGES, *TIER), draft="EAGLE", pools=("kv",)),
    "stages-ranks": Combination((*STAGES, *RANKS), num_processes=4, num_instances=2),
    "window-tier": WINDOW((*TIER, *TWO_POOLS), num_processes=1, pools=("full", "swa")),
    "states-tier": STATES(
        (*TIER, "--hicache-mem-layout", "page_first"), num_processes=1, pools=("kv", "mamba")
    ),
    "layout-tier": Combination(
        (*TIER, "--hicache-mem-layout", "page_head"), num_processes=1, pools=("kv",)
    ),
    "disk-tier": Combination(
        (*TIER, *THROUGH_DISK), num_processes=1, num_tokens=400, pools=("kv",), num_blocks=75
    ),
    "named-tier": Combination(
        (*TIER, *THROUGH_NAMED), num_processes=1, num_tokens=400, pools=("kv",), num_blocks=75
    ),
    "ratio-tier": Combination(
        (*BY_RATIO, "--hicache-ratio", "1.5"), num_processes=1, pools=("kv",), host_bytes=96 * MIB
    ),
    "default-tier": Combination(
        BY_RATIO, num_processes=1, pools=("kv",), host_bytes=128 * MIB, num_prompts=2
    ),
    "states-ngrams": STATES(NGRAM, num_processes=1, num_more=0),
    "states-draft": STATES((), draft="STANDALONE", num_processes=1, num_prompts=8),
    "states-draft-tier": STATES(
        (*TIER, "--hicache-mem-layout", "page_first"),
        draft="STANDALONE",
        num_processes=1,
        num_prompts=8,
        num_more=1,
        pools=("kv", "mamba"),
    ),
    "attention": TOGETHER(ATTENTION_RANKS),
    "attention-parts": TOGETHER(("--tp-size", "4", *ATTENTION_RANKS[2:]), num_processes=4),
    "attention-tier": TOGETHER((*ATTENTION_RANKS, *TIER), pools=("kv",)),
    "attention-draft-tier": TOGETHER((*ATTENTION_RANKS, *TIER), draft="EAGLE3", pools=("kv",)),
}
# On a CPU 0.5.15 lacks flags, kernels or layouts of the others. How it counts cores of ranks, and
# which streams copy its windows, the tests do not know; a ratio is refused before 0.5.19.
OF_ALL_RELEASES = ("layout-tier",)


@dataclass
class Served:
    """A server, and what SGLang alone answers to prompts, and to those with more behind."""

    combination: Combination
    server: Together
    first: list[Answer]
    more: list[Answer]

    def lose_caches(self) -> None:
        """Have the device's memory given away, when what is stored on disk is there."""
        self.server.settle_on_disk(self.combination.num_blocks)
        self.server.lose_caches(self.combination.num_first_pages)

    def ask(self) -> list[Answer]:
        """Ask all prompts."""
        return self.server.ask_all(self.combination.prompts())

    def ask_more(self) -> list[Answer]:
        """Ask them with more behind."""
        return self.server.ask_all(self.combination.prompts(self.combination.num_more))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in OF_ALL_RELEASES else pytest.mark.newest_release)
        for name in COMBINATIONS
    ],
)
def served(
    model: Path,
    models: Models,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Served]:
    combination = COMBINATIONS[request.param]
    arguments, plugins = combination.arguments, [COPIER] if combination.has_tier else []
    folder = model if combination.make is None else models(combination.make)
    if combination.draft:
        target, make_draft = tmp_path_factory.mktemp("target"), DRAFTS[combination.draft]
        if combination.make is None:
            folder = quiet_target(target)
        else:
            folder = quiet_copy(target, folder)
            if combination.draft == "STANDALONE":
                make_draft = embedding_draft
        draft = make_draft(tmp_path_factory.mktemp("draft"), folder)
        arguments += ("--speculative-algorithm", combination.draft, *CHAIN)
        arguments += ("--speculative-draft-model-path", str(draft))
    if ATTENTION[0] in arguments:
        plugins.append(KERNELS)
    start = partial(together, folder, num_processes=combination.num_processes, plugins=plugins)
    with start(tmp_path_factory.mktemp("vanilla"), *arguments, elastic=False) as server:
        alone = Served(combination, server, [], [])
        first, more = alone.ask(), alone.ask_more()
    with start(tmp_path_factory.mktemp("elastic"), *arguments) as server:
        yield Served(combination, server, first, more)


def tokens(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in answers]


def rate(answers: list[Answer]) -> float:
    """Return which part of what was drafted was right."""
    return sum(each.accepted for each in answers) / max(sum(each.drafted for each in answers), 1)


def test_answers_are_vanillas_also_when_the_memory_was_given_away(served: Served) -> None:
    assert len(served.server.resident()) == served.combination.num_processes
    assert served.ask() == served.first
    if served.combination.draft:
        assert 0.2 <= rate(served.first) <= 0.8
    served.lose_caches()
    found = served.ask_more()
    assert tokens(found) == tokens(served.more)
    assert rate(found) > 0 or not served.combination.has_ngrams
    if served.combination.has_tier:
        assert found == served.more  # what is drafted, too
        hits = served.server.hits()
        assert len(hits) == served.combination.num_instances
        assert min(hits) > 0
    if served.combination.host_bytes:
        (tier,) = served.server.tiers()
        assert tier.reserved_bytes == served.combination.host_bytes


def test_wrong_blocks_change_answers_and_nothing_stays(served: Served) -> None:
    combination = served.combination
    spoiling = [
        *(partial(served.server.loads_spoiled, pool) for pool in combination.pools),
        *([partial(served.server.spoiling, TARGET)] if combination.is_spoiled_by_plane else ()),
    ]
    for spoil in spoiling or [served.server.reading_wrong_blocks]:
        served.lose_caches()
        with spoil():
            assert tokens(served.ask_more()) != tokens(served.more)
        served.server.flush()
        assert tokens(served.ask()) == tokens(served.first)
    served.server.flush()
    await_that(lambda: max(served.server.resident()) <= 2 * served.server.page_bytes)
