"""Real engines on a pool where what idle ones keep leaves no room for a third one's request."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import gateway_served
from helpers.gateway_served import House, ask_all

from kvcached_core.units import MIB

# A start of twenty seconds that comes to nothing is in each: for a release.
pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.every_release]
# A block of 128 tokens is a page of 4 MiB. Block 0 is nobody's, so each engine keeps a page for it.
# The weights of one take 10 MiB: beside three such pages, 2 MiB are left for a request of 4 MiB.
POOL_BYTES = 24 * MIB
WORDS = (
    *("--dtype", "float32", "--block-size", "128", "--max-model-len", "256"),
    *("--enforce-eager", "--max-num-seqs", "4"),
)


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setitem(gateway_served.ENVIRON_OF_ALL, "KVCACHED_HOST_POOL", str(POOL_BYTES))
    monkeypatch.setattr(gateway_served, "VLLM", WORDS)
    with tempfile.TemporaryDirectory(prefix="kvcached-") as folder:
        made = House(Path(folder), "abc", "")
        yield made
        made.close()


def test_a_third_model_is_served_after_an_idle_one_was_stopped_and_that_one_again(
    house: House,
) -> None:
    with house.inside() as gateway:
        for model in "abc":
            answers = ask_all(gateway.url, [model])
            assert answers.are_all_right, (model, answers.errors)
        stopped = [
            one.model_id
            for one in gateway.call(lambda: list(gateway.here.controller.decisions))
            if one.verb == "stop"
        ]
        assert len(stopped) == 1
        assert stopped[0] in {"a", "b"}
        # Its longest request would not fit beside its weights, and yet it may start again.
        answers = ask_all(gateway.url, stopped)
        assert answers.are_all_right, answers.errors


def test_a_third_model_is_refused_with_who_holds_the_memory_where_nobody_may_go(
    house: House,
) -> None:
    pinned = {name: house.models[name] | {"pin": True} for name in "ab"}
    house.write(house.models | pinned)
    with house.inside() as gateway:
        assert ask_all(gateway.url, ["a"]).are_all_right
        assert ask_all(gateway.url, ["b"]).are_all_right
        refused = ask_all(gateway.url, ["c"])
        assert set(refused.seen) == {503}
        (error,) = refused.errors
        assert "it found too little memory again" in error
        assert "missing on host" in error
        assert "a (4 MiB)" in error
        assert "b (4 MiB)" in error
        assert ask_all(gateway.url, ["a", "b"]).are_all_right
