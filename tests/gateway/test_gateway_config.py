"""What the file of models means: names, addresses, durations."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from kvcached_core.units import check_name
from kvcached_gateway.settings.config import ModelSettings, Settings

PATH = Path("models.yaml")


def settings(**values: object) -> Settings:
    return Settings.model_validate({"path": PATH, **values})


def test_a_model_is_found_by_its_name_and_its_aliases() -> None:
    found = settings(models={"llama": {"id": "llama", "model": "/m", "aliases": ["gpt-4o"]}})
    assert found.resolve("llama") is found.models["llama"]
    assert found.resolve("gpt-4o") is found.models["llama"]
    assert found.resolve("other") is None


def test_a_copy_with_other_models_resolves_its_own() -> None:
    first = settings(models={"llama": {"id": "llama", "model": "/m"}})
    assert first.resolve("llama") is first.models["llama"]
    pinned = first.models["llama"].model_copy(update={"pin": True})
    second = first.model_copy(update={"models": {"llama": pinned}})
    assert second.resolve("llama") is pinned
    assert first.resolve("llama") is first.models["llama"]
    assert first == settings(models={"llama": {"id": "llama", "model": "/m"}})  # asked or not


@pytest.mark.parametrize(
    ("listen", "host", "port", "is_loopback"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080, True),
        ("127.8.0.1:0", "127.8.0.1", 0, True),
        ("[::1]:80", "::1", 80, True),
        ("localhost:1", "localhost", 1, True),
        ("192.0.2.1:8080", "192.0.2.1", 8080, False),
        ("[::]:8080", "::", 8080, False),
        ("[::ffff:127.0.0.1]:80", "::ffff:127.0.0.1", 80, True),
        ("[::ffff:192.0.2.1]:80", "::ffff:192.0.2.1", 80, False),
        ("gpu-box:8080", "gpu-box", 8080, False),
    ],
)
def test_an_address_has_a_host_and_a_port(
    listen: str, host: str, port: int, *, is_loopback: bool
) -> None:
    found = settings(listen=listen)
    assert (found.host, found.port, found.is_loopback) == (host, port, is_loopback)


@pytest.mark.parametrize(
    ("model_id", "name"),
    [("llama", "llama"), ("meta-llama/Llama-3.1:8b", "meta-llama-Llama-3.1-8b")],
)
def test_an_instance_is_named_after_its_model(model_id: str, name: str) -> None:
    assert ModelSettings(id=model_id).instance_name == name


def test_long_ids_have_names_of_their_own() -> None:
    names = {ModelSettings(id="a" * 100 + end).instance_name for end in "xy"}
    assert len(names) == 2
    for name in names:
        check_name(name)


@pytest.mark.parametrize("model_id", ["", "../etc", "a b", "a\n", "-x", "ä"])
def test_what_is_no_public_name_is_refused(model_id: str) -> None:
    with pytest.raises(ValidationError):
        ModelSettings(id=model_id)


def test_what_may_be_secret_is_not_shown() -> None:
    found = settings(
        environments={
            "v": {"name": "v", "engine": "vllm", "python": "/p", "env": {"TOKEN": "hush"}}
        }
    )
    assert "hush" not in repr(found)
