"""The client: arrivals do not wait for replies, and what it writes down is what came."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from aiohttp import web
from multi_model.client import (
    Record,
    Target,
    read_records,
    replay,
    write_records,
)
from multi_model.turns import TakingTurns
from multi_model.workloads import constant

Answer = Callable[[web.StreamResponse, dict[str, Any]], Coroutine[Any, Any, None]]


async def event(response: web.StreamResponse, **content: Any) -> None:
    await response.write(b"data: " + json.dumps(content).encode() + b"\n\n")


async def all_tokens(response: web.StreamResponse, body: dict[str, Any]) -> None:
    for _ in range(body["max_tokens"]):
        await event(response, choices=[{"text": "x"}])
    await event(response, choices=[], usage={"completion_tokens": body["max_tokens"]})
    await response.write(b"data: [DONE]\n\n")


def replayed(
    answer: Answer, *, num: int = 3, rate: float = 50, drain_seconds: float = 600
) -> list[Record]:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await answer(response, await request.json())
        return response

    async def run() -> list[Record]:
        app = web.Application()
        app.router.add_post("/v1/completions", handle)
        runner = web.AppRunner(app, handler_cancellation=True)  # of a client that has left
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            steady = constant(rate, num / rate, num_models=1, num_in=4, num_out=3)
            target = Target(f"http://127.0.0.1:{port}", "m")
            return await replay(steady, [target], drain_seconds=drain_seconds)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_lengths_are_exact_and_tokens_are_counted_by_the_engine() -> None:
    asked: list[dict[str, Any]] = []

    async def answer(response: web.StreamResponse, body: dict[str, Any]) -> None:
        asked.append(body)
        await all_tokens(response, body)

    records = replayed(answer)
    assert {len(body["prompt"]) for body in asked} == {4}
    assert [(record.num_tokens, record.error) for record in records] == [(3, "")] * 3
    assert all(record.ttft_seconds is not None for record in records)


def test_a_late_reply_never_delays_the_next_request() -> None:
    everybody_asked = asyncio.Event()
    num_asked = 0

    async def answer(response: web.StreamResponse, body: dict[str, Any]) -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 3:
            everybody_asked.set()
        await everybody_asked.wait()  # nobody is answered before all have asked
        await all_tokens(response, body)

    assert [record.error for record in replayed(answer)] == [""] * 3


def test_an_answer_that_is_cut_short_is_a_failure() -> None:
    async def answer(response: web.StreamResponse, _body: dict[str, Any]) -> None:
        await event(response, choices=[{"text": "x"}])

    assert {record.error for record in replayed(answer)} == {"1 of 3 tokens came"}


def test_what_has_not_ended_some_time_after_the_last_request_has_failed() -> None:
    num_asked = 0

    async def answer(response: web.StreamResponse, body: dict[str, Any]) -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 2:
            await event(response, choices=[{"text": "x"}])
            await asyncio.Event().wait()
        await all_tokens(response, body)

    records = replayed(answer, drain_seconds=4.0)  # others have so long to end, too
    assert [record.error for record in records] == ["", "TimeoutError: ", ""]
    assert [record.num_tokens for record in records] == [3, 1, 3]


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    whole = Record(1, 0.5, 8, 4, 0.001, 4, 0.25, 0.5)
    failed = Record(0, 1.0, 8, 4, error='lost, and "quoted"', turn=3)
    path = tmp_path / "records.csv"
    write_records(path, [whole, failed])
    assert read_records(path) == [whole, failed]
    earlier = [line.rpartition(",")[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(earlier))  # without turns
    assert [record.turn for record in read_records(path)] == [0, 0]


def test_one_model_is_awake_at_a_time_and_all_get_their_turn() -> None:
    log: list[tuple[str, int]] = []

    async def fall_asleep(model: int) -> None:
        log.append(("sleeps", model))

    async def wake_up(model: int) -> None:
        log.append(("wakes", model))

    async def run() -> int:
        turns = TakingTurns(fall_asleep, wake_up, patience_seconds=0.05)

        async def request(model: int) -> None:
            await turns.enter(model)
            log.append(("serves", model))
            await asyncio.sleep(0)
            turns.leave(model)

        await asyncio.gather(*(request(model) for model in (0, 1, 0, 2, 1, 0)))
        return turns.num_turns

    assert asyncio.run(run()) >= 2
    awake = 0
    for what, model in log:
        if what == "wakes":
            awake = model
        else:
            assert model == awake
    assert sorted(model for what, model in log if what == "serves") == [0, 0, 0, 1, 1, 2]
