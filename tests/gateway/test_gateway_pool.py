"""Real engines on a pool where what idle ones keep leaves no room for a third one's request."""

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from helpers import gateway_served
from helpers.gateway_served import House, ask_all, client

from kvcached_core.units import MIB

# A start of twenty seconds that comes to nothing is in each: for a release.
pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.every_release]
# A block of 128 tokens is a page of 4 MiB. Block 0 is nobody's, so each engine keeps a page for it.
# The weights of one take 10 MiB: beside three such pages, 2 MiB are left for a request of 4 MiB.
# A model's files do not tell of these pages, so a third one starts.
POOL_BYTES = 24 * MIB


def words(max_tokens: int) -> tuple[str, ...]:
    """Return the arguments of engines whose requests are no longer than this."""
    return (
        *("--dtype", "float32", "--block-size", "128", "--max-model-len", str(max_tokens)),
        *("--enforce-eager", "--max-num-seqs", "4"),
    )


def ask_long(url: str, *models: str) -> list[int]:
    """Ask models, all at once, for what takes two blocks; return the status of each answer."""

    async def ask(session: aiohttp.ClientSession, model: str) -> int:
        asked = {"model": model, "prompt": [7] * 200, "max_tokens": 4}
        async with session.post(f"{url}/v1/completions", json=asked) as answer:
            await answer.read()
            return answer.status

    async def main() -> list[int]:
        async with client() as session:
            return await asyncio.gather(*(ask(session, model) for model in models))

    return asyncio.run(main())


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setitem(gateway_served.ENVIRON_OF_ALL, "KVCACHED_HOST_POOL", str(POOL_BYTES))
    monkeypatch.setattr(gateway_served, "VLLM", words(128))
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
        # Now it is known that its longest request takes two pages, and so somebody goes at once.
        answers = ask_all(gateway.url, stopped)
        assert answers.are_all_right, answers.errors


def test_a_long_request_to_a_model_that_is_up_is_answered_after_an_idle_one_was_stopped(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_served, "VLLM", words(256))
    house.write()
    with house.inside() as gateway:
        for model in "ab":
            assert ask_all(gateway.url, [model]).are_all_right
        # Beside the weights and two first pages there are 6 MiB, and it takes two pages.
        assert ask_long(gateway.url, "b") == [200]
        stops = [
            (one.model_id, one.reason)
            for one in gateway.call(lambda: list(gateway.here.controller.decisions))
            if one.verb == "stop"
        ]
        assert [name for name, _ in stops] == ["a"]
        assert "for 'b'" in stops[0][1]


def test_long_requests_to_two_models_that_are_up_are_both_answered(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_served, "VLLM", words(256))
    house.write()
    with house.inside() as gateway:
        for model in "ab":
            assert ask_all(gateway.url, [model]).are_all_right
        # Neither fits beside the other's first page, and neither is idle before the other is gone.
        assert ask_long(gateway.url, "a", "b") == [200, 200]


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
