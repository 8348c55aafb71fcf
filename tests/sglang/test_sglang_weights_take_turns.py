"""Two SGLang servers whose weights do not fit together answer by turns, and nothing is lost."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.sglang_engine import answers
from helpers.sglang_weights import NUM_KV_PAGES, NUM_WEIGHTS, PAGE, num_weights, start_yielding

from kvcached_core.weights.moves import read_moves
from kvcached_demo.harness.load import Burst
from kvcached_demo.harness.model import make_model
from kvcached_demo.harness.servers import Servers

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

NAMES = ("one", "other")
BURST = Burst(((5, 6, 7, 8), (9,) * 40), 8)
NUM_PAGES = NUM_WEIGHTS + NUM_KV_PAGES + 2  # one of them with its KV cache, and the other's page 0
NUM_REQUESTS = 40
NUM_ROUNDS = 4
ONE_COPY = f"{(NUM_WEIGHTS + 1) * PAGE}"


@pytest.fixture(
    scope="module", params=["100%", pytest.param(ONE_COPY, marks=pytest.mark.every_release)]
)
def servers(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    """Two servers, and host memory for the copies of both, or of one: the other's is on disk."""
    assert len(NAMES) * NUM_WEIGHTS > NUM_PAGES
    with Servers(tmp_path_factory.mktemp("sg"), NUM_PAGES * PAGE) as started:
        other = make_model(started.workspace / "model", seed=2)
        for name, folder in zip(NAMES, (model, other), strict=True):
            start_yielding(started, name, folder, KVCACHED_HOST_BUDGET=request.param)
        yield started
        for name in NAMES:
            assert started[name].process.poll() is None
            assert "leak detected" not in started[name].log.read_text()
        if request.param == ONE_COPY:
            assert read_moves(started.workspace / "disk").num_read >= NUM_REQUESTS


@pytest.mark.older_release
def test_requests_by_turns_are_all_answered_and_alike(servers: Servers) -> None:
    first = {name: answers(servers[name], [BURST]) for name in NAMES}
    assert first["one"] != first["other"]
    assert {error for name in NAMES for error, _ in first[name]} == {None}
    num_before = {name: servers.view(name).activations.num for name in NAMES}
    for number in range(NUM_REQUESTS):
        name = NAMES[number % 2]
        assert answers(servers[name], [BURST]) == first[name]
        assert num_weights(servers, name) == NUM_WEIGHTS
    for name in NAMES:
        num_wakes = servers.view(name).activations.num - num_before[name]
        assert num_wakes >= NUM_REQUESTS // 2 - 1


def test_requests_to_both_at_once_are_all_answered(servers: Servers) -> None:
    for _ in range(NUM_ROUNDS):
        found = asyncio.run(servers.send(dict.fromkeys(NAMES, BURST)))
        errors = {completion.error for name in NAMES for completion in found[name]}
        assert errors == {None}
