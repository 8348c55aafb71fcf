"""The blocks of a draft model come back from the host with the target's, and are as good as before.

SGLang's drafts, tree, controller and host pools are its own; its kernels and copies need a GPU or a
package that is on no index, and the tests' are in their place, with us and without.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.engine_plugin import add_plugin
from helpers.hicache_server import HiCacheServer, hicache_server
from helpers.process_memory import resident_by_proc
from helpers.sglang_drafts import eagle_head, noised_copy, quiet_target
from helpers.sglang_engine import post
from helpers.speculating_server import ATTENTION, prompts
from helpers.spoiled_planes import VARIABLE
from helpers.waiting import await_that

from kvcached_core.units import MIB

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.every_release,
    pytest.mark.newest_release,  # 0.5.15 drafts with a model on a GPU alone
    pytest.mark.timeout(600),
]

PAGE = 2 * MIB
NUM_PROMPT_TOKENS, NUM_ANSWER_TOKENS = 200, 24
CHAIN = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1")
HOST_BYTES = 10**9  # of the target; the draft's come on top


@dataclass(frozen=True)
class Case:
    """How drafts are made.

    Attributes:
        algorithm: SGLang's name of it.
        make: Writes the draft for a target to a folder.
        share: The draft's bytes of a token, in those of the target.
    """

    algorithm: str
    make: Callable[[Path, Path], Path]
    share: float


DRAFTS = [
    pytest.param(Case("STANDALONE", noised_copy, 1.0), id="standalone"),
    pytest.param(Case("EAGLE", eagle_head, 0.25), id="eagle"),
]


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer, and how many that were drafted for it were right."""

    tokens: list[int]
    accepted: int
    drafted: int


@dataclass
class Pair:
    """A server with drafts and a host tier, and what SGLang alone answers.

    Attributes:
        server: The server.
        first: What SGLang alone answers at first.
        again: The same with prompts that it has cached.
        share: The draft's bytes of a token, in those of the target.
    """

    server: HiCacheServer
    first: list[Answer]
    again: list[Answer]
    share: float


def asked(server: HiCacheServer) -> list[Answer]:
    answers = []
    for prompt in prompts(1, 6, NUM_PROMPT_TOKENS):
        tokens, said = server.answer(prompt, NUM_ANSWER_TOKENS)
        counts = said["spec_num_correct_drafts"], said["spec_num_proposed_drafts"]
        answers.append(Answer(tokens, *counts))
    return answers


def tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


@pytest.fixture(scope="module", params=DRAFTS)
def pair(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Pair]:
    case: Case = request.param
    target = quiet_target(tmp_path_factory.mktemp("target"))
    draft = case.make(tmp_path_factory.mktemp("draft"), target)

    def started(name: str, *, elastic: bool = True) -> AbstractContextManager[HiCacheServer]:
        folder = tmp_path_factory.mktemp(name)
        return hicache_server(
            target,
            folder,
            *("--speculative-algorithm", case.algorithm, "--speculative-num-draft-tokens", "4"),
            *("--speculative-draft-model-path", str(draft)),
            *CHAIN,
            *ATTENTION,
            elastic=elastic,
            KVCACHED_PAGE_BYTES=str(PAGE),
            TORCHDYNAMO_DISABLE="1",
            **add_plugin(folder / "plugin", "helpers.spoiled_planes"),
            **{VARIABLE: str(folder / "spoiled")},
        )

    with started("vanilla", elastic=False) as server:
        first, again = asked(server), asked(server)
    with started("elastic") as server:
        yield Pair(server, first, again, case.share)


def lose_cache(server: HiCacheServer) -> None:
    await_that(lambda: server.trim() == PAGE)


def test_drafts_that_come_back_are_accepted_as_those_that_stayed(pair: Pair) -> None:
    accepted = sum(each.accepted for each in pair.first)
    assert 0.2 <= accepted / sum(each.drafted for each in pair.first) <= 0.8
    assert asked(pair.server) == pair.first
    lose_cache(pair.server)
    loaded = pair.server.counts().hit_tokens
    assert asked(pair.server) == pair.again
    assert pair.server.counts().hit_tokens > loaded


def test_what_is_loaded_of_either_model_matters(pair: Pair) -> None:
    lose_cache(pair.server)
    with pair.server.loads_spoiled("draft"):
        spoiled = asked(pair.server)
    assert tokens(spoiled) == tokens(pair.again)
    assert spoiled != pair.again
    lose_cache(pair.server)
    with pair.server.loads_spoiled("kv"):
        assert tokens(asked(pair.server)) != tokens(pair.again)


def test_both_models_copies_are_counted_and_nothing_stays_on_the_device(pair: Pair) -> None:
    post(f"{pair.server.server.url}/flush_cache")
    await_that(lambda: resident_by_proc(pair.server.server) <= 2 * PAGE)
    (view,) = pair.server.tiers()
    assert view.reserved_bytes == pytest.approx(HOST_BYTES * (1 + pair.share), rel=0.01)
