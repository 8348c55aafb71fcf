"""What the gateway's benchmark on a GPU sends, and the file that its gateway reads."""

from collections import Counter
from pathlib import Path

import pytest
import yaml
from gateway_client import Answer
from gateway_schedule import ANSWER_SECONDS, Due, bursts, num_overlapping, prompt, rivals
from gateway_serve import Gateway

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
    assert tokens["one"] / speed / seconds == pytest.approx(0.7, rel=0.1)
    assert tokens["two"] / speed / seconds == pytest.approx(0.25, rel=0.01)
    assert {due.at_seconds for due in schedule if due.model == "two"} == {1.0}
    assert max(due.at_seconds for due in schedule) < seconds


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
