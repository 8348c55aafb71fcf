"""What the gateway's benchmark on a GPU sends, and the file that its gateway reads."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml
from aiohttp import web
from gateway_gpu import LOOSE_TOKENS, STRICT_TOKENS
from helpers.gateway_replay import Asked, replay
from parts.gateway_client import Answer, send, send_first
from parts.gateway_schedule import (
    ANSWER_SECONDS,
    LOOSE_SHARE,
    STRICT_SHARE,
    Due,
    bursts,
    num_overlapping,
    prompt,
    rivals,
    start_seconds,
)
from parts.gateway_serve import Gateway

from kvcached_core.units import GIB
from kvcached_gateway.settings.config_file import read_settings

NAMES = [f"model-{number}" for number in range(6)]
PROMPTS = [prompt(number, 8) for number in range(4)]
CLASSES = {"strict": {"ttft": "500ms"}, "loose": {"ttft": "30s"}}


def a_gateway(*, tiny: bool, cards: int = 1) -> Gateway:
    return Gateway(3, cards=cards, tiny=tiny, headroom_bytes=61 * GIB, tiny_kv_bytes=0)


@pytest.mark.parametrize("seed", range(20))
def test_bursts_of_at_most_two_models_overlap(seed: int) -> None:
    schedule = bursts(NAMES, PROMPTS, num_requests=1000, num_in_burst=20, num_tokens=16, seed=seed)
    assert len(schedule) == 1000
    assert num_overlapping(schedule) == 2
    assert set(NAMES) == {due.model for due in schedule}


def test_three_models_that_are_asked_within_an_answers_time_overlap() -> None:
    three = [Due(number * ANSWER_SECONDS / 2, NAMES[number], (3,), 1) for number in range(3)]
    assert num_overlapping(three) == 3
    assert num_overlapping([*three[:2], Due(2 * ANSWER_SECONDS, NAMES[2], (3,), 1)]) == 2


def test_each_model_is_asked_each_prompt_of_the_bursts() -> None:
    schedule = bursts(NAMES, PROMPTS, num_requests=1000, num_in_burst=20, num_tokens=16)
    assert {(due.model, due.prompt) for due in schedule} == {
        (name, words) for name in NAMES for words in PROMPTS
    }


def test_rivals_take_the_shares_of_the_device_that_they_are_to_take() -> None:
    speed, seconds = 20_000.0, 60.0
    schedule = rivals(
        "one", "two", tokens_per_second=speed, seconds=seconds, strict_tokens=500, loose_tokens=1000
    )
    tokens = Counter[str]()
    for due in schedule:
        tokens[due.model] += len(due.prompt)
    assert tokens["one"] / speed / seconds == pytest.approx(STRICT_SHARE, rel=0.1)
    assert tokens["two"] / speed / seconds == pytest.approx(LOOSE_SHARE, rel=0.01)
    assert {due.at_seconds for due in schedule if due.model == "two"} == {1.0}
    assert max(due.at_seconds for due in schedule) < seconds


# Of the run on an H200 from which the next one's load was chosen.
GAUGED = 30_651.8
GOALS_SECONDS = {"strict": 0.489, "loose": 30.0}
ATTAINED = {"without": (0.765, 1.0), "with": (1.0, 1.0)}


def attained(strict_share: float, speed: float, *, has_classes: bool) -> tuple[float, float]:
    """Replay the load of that run's device; return what part of each model's is in time."""
    schedule = rivals(
        "strict",
        "loose",
        tokens_per_second=GAUGED,
        seconds=20.0,
        strict_tokens=STRICT_TOKENS,
        loose_tokens=LOOSE_TOKENS,
        strict_share=strict_share,
    )
    asked = [
        Asked(due.at_seconds, due.model, len(due.prompt), GOALS_SECONDS[due.model])
        for due in schedule
    ]
    replay(asked, has_admission=has_classes, tokens_per_second=speed * GAUGED)
    parts = ([one.is_in_time for one in asked if one.model == name] for name in GOALS_SECONDS)
    first, second = (sum(part) / len(part) for part in parts)
    return first, second


@pytest.mark.parametrize("way", ["without", "with"])
def test_a_replay_says_what_a_run_with_an_easier_load_said(way: str) -> None:
    assert attained(0.7, 1.22, has_classes=way == "with") == pytest.approx(ATTAINED[way], abs=0.02)


def test_the_load_leaves_room_for_what_classes_are_to_gain() -> None:
    strict, loose = attained(STRICT_SHARE, 1.22, has_classes=False)
    assert 0.4 <= strict <= 0.7
    assert loose == 1
    for speed in (1.12, 1.32):
        assert attained(STRICT_SHARE, speed, has_classes=False)[0] < 0.7
        assert attained(STRICT_SHARE, speed, has_classes=True) == (1, 1)


def test_an_answer_makes_its_goal_only_if_it_came_whole() -> None:
    due = Due(0.0, "one", (3,), 1)
    assert Answer(due, [5], ttft_seconds=0.5).is_within(0.5)
    assert not Answer(due, [5], ttft_seconds=0.6).is_within(0.5)
    assert not Answer(due, [5], ttft_seconds=0.1, error="0 of 1 tokens came").is_within(0.5)


@pytest.mark.parametrize("tiny", [True, False])
def test_the_file_is_one_that_the_gateway_reads(tmp_path: Path, *, tiny: bool) -> None:
    gateway = a_gateway(tiny=tiny)
    try:
        file = tmp_path / "models.yaml"
        file.touch(mode=0o600)
        file.write_text(
            yaml.safe_dump(gateway.settings(CLASSES, {"model-0": "strict", "model-1": "loose"}))
        )
        settings = read_settings(file)
    finally:
        gateway.close()
    assert list(settings.models) == gateway.names
    assert [model.class_name for model in settings.models.values()] == ["strict", "loose", None]
    assert settings.classes["strict"].ttft_seconds == 0.5
    assert settings.devices == (("host",) if tiny else ("0",))
    if not tiny:  # distinct weights, on a device that is made small
        variables = [environment.env for environment in settings.environments.values()]
        assert [each["DUMMY_SEED"] for each in variables] == ["0", "1", "2"]
        assert {each["KVCACHED_HEADROOM"] for each in variables} == {str(61 * GIB)}


def test_two_cards_are_both_in_the_file() -> None:
    gateway = a_gateway(tiny=False, cards=2)
    try:
        assert gateway.settings({}, {})["devices"] == ["0", "1"]
    finally:
        gateway.close()


@asynccontextmanager
async def a_server_where_one_model_is_never_up() -> AsyncIterator[tuple[str, asyncio.Event]]:
    """Serve in a block; the event says that the model was asked that is never up."""
    asked = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        if (await request.json())["model"] == "never":
            asked.set()
            await asyncio.Event().wait()
        return web.Response(body=b'data: {"choices": [{"token_ids": [7]}]}\n\ndata: [DONE]\n\n')

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()


DUE = [Due(0.0, name, (3,), 1) for name in ("soon", "never")]


def test_who_is_cut_off_has_the_answers_that_came() -> None:
    answers: list[Answer] = []

    async def main() -> None:
        async with a_server_where_one_model_is_never_up() as (url, asked):
            sending = asyncio.create_task(send(url, DUE, answers))
            await asked.wait()
            while not answers[0].is_over:  # noqa: ASYNC110  nobody tells
                await asyncio.sleep(0.01)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    asyncio.run(main())
    assert [(one.is_over, one.token_ids, one.error) for one in answers] == [
        (True, [7], ""),
        (False, [], ""),
    ]


def test_who_is_up_is_said_at_each_first_answer_and_who_is_not_in_time() -> None:
    noted: list[list[str]] = []

    async def main() -> None:
        async with a_server_where_one_model_is_never_up() as (url, _):
            await send_first(
                url,
                DUE,
                0.5,
                lambda answers: noted.append([one.due.model for one in answers if not one.error]),
            )

    asyncio.run(main())
    assert noted == [[], ["soon"]]


@pytest.mark.parametrize(
    ("end", "limit", "expected"), [(None, 900.0, 900.0), (420, 900.0, 260.0), (420, 250.0, 250.0)]
)
def test_the_bursts_have_their_time_where_there_is_an_end(
    end: int | None, limit: float, expected: float
) -> None:
    assert start_seconds(1000, limit, end) == expected
