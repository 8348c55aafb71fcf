"""A tiny model, and engines in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.engines import ENGINE_ENVIRON, TESTS, Offline

from kvcached_core.cli.demo.model import make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama", seed=1)


@pytest.fixture
def start_offline(model: Path, tmp_path: Path) -> Offline:
    """Return a function that starts a script of `helpers`; `environ` switches kvcached on."""

    def start(
        environ: Mapping[str, str], script_name: str = "offline", **options: Any
    ) -> "subprocess.Popen[str]":
        script = TESTS / "helpers" / f"{script_name}.py"
        variables = {**os.environ, **ENGINE_ENVIRON, "TMPDIR": str(tmp_path), **environ}
        return subprocess.Popen(
            [sys.executable, str(script), str(model), json.dumps(options)],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
