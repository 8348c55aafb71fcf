"""A tiny model; these tests run in SGLang's own environment (make test does)."""

from pathlib import Path

import pytest

from kvcached_core.cli.demo.model import make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama", seed=1)
