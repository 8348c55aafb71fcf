"""Two busy models on one card: what is loaded, and what it comes to."""

import argparse
import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import busy_neighbours
import pytest
from aiohttp import web
from busy_neighbours import is_way, loads, slower, tokens_per_second
from parts import mps
from parts.record import Record

ROUND = {
    "a alone": [100.0],
    "a beside a": [40.0, 60.0],
    "a alone again": [80.0],
    "b alone": [300.0],
    "b beside b": [150.0, 150.0],
    "b alone again": [300.0],
    "a beside b": [50.0, 100.0],
}


def test_a_round_has_each_shape_alone_beside_its_like_and_beside_the_other() -> None:
    found = {load.name: load.names for load in loads(["a", "b"])}
    assert list(found) == list(ROUND)
    assert found["a beside a"] == ("a-0", "a-1")
    assert found["a beside b"] == ("a-0", "b-0")


def test_a_model_is_so_many_times_slower_than_alone_in_the_same_round() -> None:
    other = {name: [2 * rate for rate in rates] for name, rates in ROUND.items()}
    found = slower([ROUND, other], ["a", "b"])
    medians = {name: values[0] for name, values in found.items()}
    assert medians == {
        "a beside a": 2.5,
        "a alone again": 1.25,
        "b beside b": 2.0,
        "b alone again": 1.0,
        "a beside b": 2.0,
        "b beside a": 3.0,
    }


@pytest.mark.parametrize("other_rounds", [[], [ROUND, ROUND]])
def test_a_model_that_gave_no_token_in_a_round_has_no_figure(other_rounds: list[Any]) -> None:
    silent = ROUND | {"a beside b": [50.0, 0.0]}
    assert slower([*other_rounds, silent], ["a", "b"])["b beside a"] == []


@pytest.mark.parametrize("words", ["plain", "mps", "mps:60", "mps:100"])
def test_ways_are_understood(words: str) -> None:
    assert is_way(words) == words


@pytest.mark.parametrize("words", ["", "plain:60", "mps:", "mps:0", "mps:101", "mps:many", "mig"])
def test_other_ways_are_refused_by_name(words: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{words}' is not plain"):
        is_way(words)


class Standin:
    """A server that counts the tokens it was asked for.

    Attributes:
        names: Which models it was asked for, and how often.
    """

    name = "m"

    def __init__(self, status: int) -> None:
        self.names: Counter[str] = Counter()
        self.url = ""
        self._status = status
        self._num_tokens = 0

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.names[body["model"]] += 1
        self._num_tokens += body["max_tokens"]
        await asyncio.sleep(0)
        return web.json_response({}, status=self._status)

    def metric(self, name: str) -> float:
        assert name == busy_neighbours.GENERATED
        return self._num_tokens


async def loaded(standin: Standin, seconds: float) -> list[float]:
    app = web.Application()
    app.router.add_post("/v1/completions", standin.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    standin.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    servers: Any = [standin]
    try:
        return await tokens_per_second(servers, 2, seconds, 7)
    finally:
        await runner.cleanup()


def test_tokens_are_the_servers_own_count_over_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_neighbours, "WARM_SECONDS", 0.0)
    standin = Standin(200)
    (rate,) = asyncio.run(loaded(standin, 0.2))
    assert 0 < rate < standin.metric(busy_neighbours.GENERATED) / 0.2 + 1
    assert set(standin.names) == {"m"}


def test_a_server_that_refuses_ends_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_neighbours, "WARM_SECONDS", 0.0)
    with pytest.raises(ExceptionGroup):
        asyncio.run(loaded(Standin(500), 600.0))


def test_a_way_that_cannot_be_had_is_recorded_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mps, "CONTROL", "there-is-no-such-daemon")
    record = Record(tmp_path / "busy.json")
    busy_neighbours.play("mps", argparse.Namespace(tiny=True), record)
    found = json.loads(record.path.read_text())["mps"]
    assert found == {"rounds": [], "failed": "MpsError: there-is-no-such-daemon is not there"}
