"""A tiny model, and engines in processes of their own."""

from pathlib import Path

import pytest
from helpers.engines import Offline, offline_in

from kvcached_demo.harness.model import make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama", seed=1)


@pytest.fixture
def start_offline(model: Path, tmp_path: Path) -> Offline:
    """Return a function that starts a script of `helpers`; `environ` switches kvcached on."""
    return offline_in(tmp_path, model)
