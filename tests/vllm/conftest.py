"""A tiny model, and engines in processes of their own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.engines import SCRIPT_ENVIRON, TESTS, Offline, Started
from helpers.nursery import start_warm

from kvcached_demo.harness.model import make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama", seed=1)


@pytest.fixture
def start_offline(model: Path, tmp_path: Path) -> Offline:
    """Return a function that starts a script of `helpers`; `environ` switches kvcached on.

    It is forked from a parent that has imported vLLM, or started as users do if it is `cold`.
    """

    def start(
        environ: Mapping[str, str],
        script_name: str = "offline",
        *,
        cold: bool = False,
        **options: Any,
    ) -> Started:
        words = [str(TESTS / "helpers" / f"{script_name}.py"), str(model), json.dumps(options)]
        variables = {**os.environ, **SCRIPT_ENVIRON, "TMPDIR": str(tmp_path), **environ}
        folder = Path(tempfile.mkdtemp(dir=tmp_path, prefix="run-"))
        output, errors = folder / "output", folder / "errors"
        with output.open("w") as out, errors.open("w") as err:
            if cold:
                process: Any = subprocess.Popen(
                    [sys.executable, *words], env=variables, stdout=out, stderr=err
                )
            else:
                process = start_warm(
                    "vllm", words, variables, output=out.fileno(), errors=err.fileno()
                )
        return Started(process, output, errors)

    return start
