"""What a reload changes: engines start again only for what they are started with."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_gateway.settings.config import Settings
from kvcached_gateway.settings.reload import FIXED, Difference, difference, engine_digest

MODEL = {"id": "one", "environment": "vllm", "model": "m"}
SAMPLES: dict[str, Any] = {
    "environment": "sglang",
    "model": "n",
    "revision": "r",
    "aliases": ["a"],
    "args": ["--seed", "1"],
    "tensor_parallel": 2,
    "devices": ["0"],
    "nodes": ["gpu=H100"],
    "when_idle": "stop",
    "url": "http://x",
    "key_env": "K",
    "adapter_of": "two",
    "path": "/p",
    "class": "chat",
    "pin": True,
    "kv": {"limit": "50%"},
    "idle_limit": "3s",
    "max_wait": "3s",
    "max_queue": 3,
    "max_concurrent": 3,
    "start_limit": "3s",
    "loading": "refuse",
    "warm_at": ["daily 7:00"],
    "warm_with": ["two"],
    "kind": "pooling",
}
STARTED_WITH = {
    *("environment", "model", "revision", "aliases", "args", "tensor_parallel", "devices"),
    *("when_idle", "url", "key_env", "adapter_of", "path"),
}


def settings(*models: dict[str, Any], **top: Any) -> Settings:
    environments = {
        name: {"name": name, "engine": name, "python": "/p", "env": {"A": "1"}}
        for name in ("vllm", "sglang")
    }
    return Settings.model_validate(
        {
            "path": Path("models.yaml"),
            "environments": environments,
            "models": {model["id"]: model for model in models},
            **top,
        }
    )


def test_the_same_file_changes_nothing() -> None:
    found = difference(settings(MODEL), settings(MODEL))
    assert found == Difference()
    assert found.sentence() == "no model differs"


def test_models_come_and_go() -> None:
    two = {**MODEL, "id": "two"}
    found = difference(settings(MODEL), settings(two))
    assert (found.added, found.removed) == (("two",), ("one",))
    assert found.sentence() == "added two; removed one"


def test_every_setting_of_a_model_has_a_sample() -> None:
    from kvcached_gateway.settings.config import ModelSettings

    assert set(SAMPLES) == set(ModelSettings.keys())


@pytest.mark.parametrize("key", SAMPLES)
def test_an_engine_starts_again_for_what_it_is_started_with_alone(key: str) -> None:
    found = difference(settings(MODEL), settings({**MODEL, key: SAMPLES[key]}))
    assert (found.changed, found.adjusted) == (
        (("one",), ()) if key in STARTED_WITH else ((), ("one",))
    )


def test_an_engine_that_does_not_yield_either_way_does_not_start_again() -> None:
    stop, stay = ({**MODEL, "when_idle": word} for word in ("stop", "stay"))
    assert difference(settings(stop), settings(stay)).adjusted == ("one",)


@pytest.mark.parametrize("field", ["python", "env", "args"])
def test_engines_of_an_environment_that_changed_start_again(field: str) -> None:
    old = settings(MODEL, {**MODEL, "id": "two", "environment": "sglang"})
    values: dict[str, Any] = {"python": Path("/q"), "env": {"A": "2"}, "args": ("-x",)}
    changed = old.environments["vllm"].model_copy(update={field: values[field]})
    new = old.model_copy(update={"environments": {**old.environments, "vllm": changed}})
    assert difference(old, new).changed == ("one",)


@pytest.mark.parametrize(
    ("key", "value"),
    [("listen", "127.0.0.1:1"), ("keys_file", "/k"), ("workers", 2), ("devices", ["host"])],
)
def test_what_only_a_restart_changes_is_named(key: str, value: object) -> None:
    found = difference(settings(MODEL), settings(MODEL, **{key: value}))
    assert found.fixed == (key,)
    assert key in FIXED


def test_other_top_keys_change_at_once() -> None:
    new = settings(MODEL, engines_on_exit="keep", max_body="1MiB", host_memory="1GiB")
    assert not difference(settings(MODEL), new).fixed


@given(st.dictionaries(st.sampled_from(sorted(SAMPLES)), st.booleans()))
def test_two_engines_have_one_digest_if_they_are_started_alike(chosen: dict[str, bool]) -> None:
    model = {**MODEL, **{key: SAMPLES[key] for key, is_on in chosen.items() if is_on}}
    digests = {
        engine_digest(found.models["one"], found.environments.get(environment))
        for found, environment in (
            (settings(MODEL), "vllm"),
            (settings(model), model["environment"]),
        )
    }
    alike = len(digests) == 1
    assert alike == (not STARTED_WITH & {key for key, is_on in chosen.items() if is_on})
