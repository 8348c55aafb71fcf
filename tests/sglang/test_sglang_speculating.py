"""Speculative decoding answers, and accepts drafts, as without us, also while memory goes.

SGLang's workers, trees, attention and scheduler are its own; its kernels for a CPU are compiled and
not on the package index, so the tests' are in their place, with us and without.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.process_memory import resident_by_proc
from helpers.sglang_drafts import eagle_head, noised_copy, quiet_target
from helpers.speculating_server import (
    NUM_ANSWER_TOKENS,
    PAGE,
    Answer,
    SpeculatingServer,
    prompts,
    speculating_server,
)
from helpers.spoiled_planes import DRAFT, TARGET
from helpers.waiting import await_that

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.every_release,
    pytest.mark.newest_release,  # 0.5.15 drafts with a model on a GPU alone
]

CHAIN = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1")
TREE = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "2")
NO_RADIX = ("--disable-radix-cache",)


@dataclass(frozen=True)
class Case:
    """How drafts are made.

    Attributes:
        algorithm: SGLang's name of it.
        draft: Writes the draft for a target to a folder; None: there is no model.
        more: Further arguments.
    """

    algorithm: str
    draft: Callable[[Path, Path], Path] | None
    more: tuple[str, ...]

    def flags(self, folder: Path, target: Path) -> tuple[str, ...]:
        """Return the arguments of a server."""
        flags = ("--speculative-algorithm", self.algorithm, "--speculative-num-draft-tokens", "4")
        if self.draft is not None:
            flags += ("--speculative-draft-model-path", str(self.draft(folder, target)))
        return (*flags, *self.more)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quiet_target(tmp_path_factory.mktemp("target"))


def asked(server: SpeculatingServer) -> list[Answer]:
    """Ask a few prompts one by one, then many at once, some of which end in what was answered."""
    alone = [answer for prompt in prompts(1, 2) for answer in server.ask([prompt])]
    return [*alone, *server.ask([*prompts(2), *prompts(1, 1)])]


def check_rates(answers: list[Answer]) -> None:
    accepted, drafted = (
        sum(getattr(each, name) for each in answers) for name in ("accepted", "drafted")
    )
    assert 0.2 <= accepted / drafted <= 0.8


def take_and_give(server: SpeculatingServer) -> list[Answer]:
    """Have a neighbour take all that it gets while requests decode, and give it back later."""

    async def race() -> list[Answer]:
        answering = asyncio.create_task(server.ask_all(prompts(3, 10), 3 * NUM_ANSWER_TOKENS))
        neighbour, num_taken = server.neighbour(), 0
        while not answering.done():
            await asyncio.sleep(0.2)
            taken = neighbour.take(32)
            num_taken += taken
            if not taken and num_taken:
                neighbour.rest(num_taken)
                neighbour.give(num_taken)
                num_taken = 0
        neighbour.rest(num_taken)
        neighbour.give(num_taken)
        neighbour.close()
        return answering.result()

    return asyncio.run(race())


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case("STANDALONE", noised_copy, CHAIN), id="standalone"),
        pytest.param(Case("EAGLE", eagle_head, CHAIN), id="eagle"),
    ],
)
def test_drafts_are_accepted_as_without_us_and_lose_nothing_to_a_neighbour(
    tmp_path: Path, target: Path, case: Case
) -> None:
    drafting = case.flags(tmp_path / "draft", target)
    with speculating_server(target, tmp_path / "vanilla", *drafting, elastic=False) as server:
        expected = asked(server)
        tokens = [answer.tokens for answer in server.ask(prompts(3, 10), 3 * NUM_ANSWER_TOKENS)]
    if case.draft is not None:
        check_rates(expected)
    with speculating_server(target, tmp_path / "elastic", *drafting, *NO_RADIX) as server:
        assert asked(server) == expected
        await_that(lambda: resident_by_proc(server.server) <= 2 * PAGE)
        stopped = take_and_give(server)
        assert [answer.tokens for answer in stopped] == tokens
        assert sum(answer.num_retractions for answer in stopped) > 0
        with server.spoiling(TARGET):
            spoiled = asked(server)
        assert [each.tokens for each in spoiled] != [each.tokens for each in expected]
        if case.draft is not None:
            with server.spoiling(DRAFT):
                spoiled = asked(server)
            assert [each.tokens for each in spoiled] == [each.tokens for each in expected]
            assert [each.accepted for each in spoiled] != [each.accepted for each in expected]
        await_that(lambda: resident_by_proc(server.server) <= 2 * PAGE)
