"""What SGLang publishes of its prefix cache stays true while memory comes and goes.

The tree, the publisher and, where there is one, the server are SGLang's own.
"""

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.kv_events import PAGE, EventsRace, events_server
from helpers.kv_events_tree import PublishedTree
from helpers.waiting import await_that

from kvcached_core.units import MIB

pytestmark = [pytest.mark.sglang]

POOL = 48 * MIB
NUM_OPERATIONS = 1000
NUM_PROMPTS, MAX_TOKENS, MAX_RUNNING = 8, 160, 4


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[PublishedTree]:
    made = PublishedTree(tmp_path / "kv")
    yield made
    made.close()


def check(tree: PublishedTree, prompts: list[list[int]]) -> int:
    """See that the mirror is what the tree is, once all is published; return its tokens."""
    tree.publish()
    report, mirror = tree.report(prompts), tree.mirror

    def is_equal() -> bool:
        mirror.listen()
        found = [mirror.num_found(prompt) for prompt in prompts]
        return {"num_found": found, "num_tokens": mirror.num_tokens} == report

    await_that(is_equal)
    return int(report["num_tokens"])


def begin(tree: PublishedTree) -> None:
    def hears() -> bool:
        tree.flush()
        tree.publish()
        return tree.mirror.listen()

    await_that(hears)


def make_prompts(source: random.Random) -> list[list[int]]:
    shared = [source.randrange(3, 500) for _ in range(MAX_TOKENS)]
    return [
        [
            *shared[: source.randrange(MAX_TOKENS)],
            *(source.randrange(3, 500) for _ in range(source.randrange(1, MAX_TOKENS))),
        ]
        for _ in range(NUM_PROMPTS)
    ]


def acts_of(
    tree: PublishedTree, source: random.Random, prompts: list[list[int]]
) -> list[tuple[str, Callable[[], None], float]]:
    """Return what may happen next, each with its share."""
    acts = [
        ("trim", lambda: tree.give(1000), 0.1),
        ("pressure", lambda: tree.give(source.randrange(1, 6), source.randrange(2)), 0.15),
    ]
    if len(tree.running) < MAX_RUNNING:
        prompt = source.choice(prompts)
        length = source.randrange(1, len(prompt) + 1)
        acts.append(("begin", lambda: tree.begin(prompt[:length]), 0.5))
    if tree.running:
        request = source.choice(tree.running)
        acts.append(("end", lambda: tree.end(request), 0.4))
        acts.append(("retraction", lambda: tree.retract(request), 0.1))
    else:
        acts.append(("flush", tree.flush, 0.05))
        acts.append(("sleep", tree.sleep, 0.05))
    return acts


def test_a_mirror_of_the_events_is_the_cache_through_a_thousand_operations(
    tree: PublishedTree,
) -> None:
    source = random.Random(0)
    prompts = make_prompts(source)
    begin(tree)
    counts: dict[str, int] = {}
    largest = 0
    for _ in range(NUM_OPERATIONS):
        acts = acts_of(tree, source, prompts)
        (name, act, _) = source.choices(acts, [share for *_, share in acts])[0]
        act()
        counts[name] = counts.get(name, 0) + 1
        if not tree.running:
            largest = max(largest, check(tree, prompts))
    for request in [*tree.running]:
        tree.end(request)
    check(tree, prompts)
    assert min(counts.values()) > 10, counts
    assert len(counts) == 7
    assert largest > MAX_TOKENS
    assert min(tree.mirror.num_by_type.values()) > 10


def test_what_a_neighbour_took_is_published_though_nobody_else_publishes(
    tree: PublishedTree,
) -> None:
    begin(tree)
    prompt = [*range(3, 203)]
    tree.begin(prompt)
    (request,) = tree.running
    tree.end(request)
    assert check(tree, [prompt]) == len(prompt)
    tree.give(1000)
    num_left = tree.report([prompt])["num_tokens"]
    assert num_left < len(prompt)

    def is_told() -> bool:
        tree.mirror.listen()
        return tree.mirror.num_tokens == num_left

    await_that(is_told)


def race(model: Path, folder: Path, block_tokens: int, num_operations: int) -> None:
    size = ("--page-size", str(block_tokens))
    with events_server(model, folder, *size, pool_bytes=POOL) as server:
        server.begin()
        run = EventsRace(server, POOL, seed=block_tokens)
        asyncio.run(run.run(num_operations))
        assert min(run.counts.values()) > 0, run.counts
        assert run.num_operations >= num_operations
        assert min(server.mirror.num_by_type.values()) > 0
        prompt = list(range(3, 3 + 18 * 16))  # whole blocks
        server.ask(prompt)
        assert server.check() >= len(prompt)
        assert server.mirror.num_found(prompt) == len(prompt)
        # SGLang lets go of what a request had in a turn of its loop behind the last answer.
        await_that(lambda: server.trim() <= 2 * PAGE)
        num_kept = server.check()
        assert server.mirror.num_found(prompt) <= num_kept < len(prompt)


@pytest.mark.slow
@pytest.mark.every_release
@pytest.mark.parametrize("block_tokens", [1, 16])
def test_a_mirror_of_a_server_is_its_cache_through_a_thousand_operations(
    model: Path, tmp_path: Path, block_tokens: int
) -> None:
    race(model, tmp_path, block_tokens, NUM_OPERATIONS)
