"""Tiny models, and what SGLang answers without kvcached (make test runs these tests)."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.sglang_engine import Answers, Models, Vanilla, vanilla_answers

from kvcached_demo.harness.load import Burst
from kvcached_demo.harness.model import make_model


@pytest.fixture(scope="session", autouse=True)
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have servers compile what hashes their blocks into a folder of this run.

    One that is ended meanwhile leaves a lock, for which up to 0.5.15 all others wait forever.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama", seed=1)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Return a function with the folder of a model, written once."""

    @functools.cache
    def folder_of(make: Callable[[], Any]) -> Path:
        from helpers.sglang_models import save

        return save(make, tmp_path_factory.mktemp("models") / make.__name__)

    return folder_of


@pytest.fixture(scope="session")
def vanilla(tmp_path_factory: pytest.TempPathFactory) -> Vanilla:
    """Return a function with vanilla's answers: to the same bursts and flags once in a run."""

    @functools.cache
    def ask(model: Path, bursts: tuple[Burst, ...], *arguments: str) -> Answers:
        return vanilla_answers(model, tmp_path_factory.mktemp("sg"), bursts, *arguments)

    return ask
