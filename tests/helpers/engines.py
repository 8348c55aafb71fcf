"""Engines in processes of their own, and how they ended."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from helpers.nursery import start_warm
from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.server import ENGINE_ENVIRON

if TYPE_CHECKING:
    from helpers.nursery import WarmProcess

TESTS = Path(__file__).parents[1]
VANILLA = {"ENABLE_KVCACHED": "0"}
SCRIPT_ENVIRON = {
    **ENGINE_ENVIRON,
    **VLLM.host_environ,
    "VLLM_LOGGING_LEVEL": "WARNING",
    "PYTHONPATH": ":".join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
}


@dataclass(frozen=True)
class Run:
    """How a script ended."""

    returncode: int
    output: str
    errors: str

    @property
    def report(self) -> Any:
        lines = [line for line in self.output.splitlines() if line.startswith("{")]
        return json.loads(lines[-1])


@dataclass(frozen=True)
class Started:
    """A script that runs, and the files with what it says."""

    process: "WarmProcess | subprocess.Popen[bytes]"
    output: Path
    errors: Path


Offline = Callable[..., Started]


def ours(folder: Path, **settings: str) -> dict[str, str]:
    """Return the variables of an elastic engine whose ledger is in a folder."""
    return {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_DIR": str(folder / "kv"),
        "KVCACHED_HOST_POOL": "512MiB",
        **settings,
    }


def yielding(folder: Path, **settings: str) -> dict[str, str]:
    """Return the variables of one whose weights go at once where others need their memory."""
    weights = {"KVCACHED_WEIGHTS": "yield", "KVCACHED_WEIGHTS_KEPT_SECONDS": "0"}
    return ours(folder, **{"KVCACHED_HOST_POOL": "128MiB", **weights} | settings)


def offline_in(folder: Path, model: Path) -> Offline:
    """Return a function that starts a script of `helpers` with a model, and keeps what it says.

    It is forked from a parent that has imported vLLM, or started as users do if it is `cold`.

    Args:
        folder: Where its output and its temporary files are.
        model: The model's folder.
    """

    def start(
        environ: Mapping[str, str],
        script_name: str = "offline",
        *,
        cold: bool = False,
        **options: Any,
    ) -> Started:
        words = [str(TESTS / "helpers" / f"{script_name}.py"), str(model), json.dumps(options)]
        variables = {**os.environ, **SCRIPT_ENVIRON, "TMPDIR": str(folder), **environ}
        output_folder = Path(tempfile.mkdtemp(dir=folder, prefix="run-"))
        output, errors = output_folder / "output", output_folder / "errors"
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


def run_beside_vanilla(
    folder: Path,
    model: Path,
    script_name: str,
    settings: Mapping[str, str] = MappingProxyType({}),
    **options: Any,
) -> tuple[Run, Run]:
    """Return how a script ended with vanilla vLLM, and with ours, which says what it does."""
    start = offline_in(folder, model)
    elastic = {"KVCACHED_HOST_POOL": "1GiB", "KVCACHED_DEBUG": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    environs = (VANILLA, ours(folder, **elastic, **settings))
    started = [start(environ, script_name, **options) for environ in environs]
    theirs, our_own = map(end_well, started)
    return theirs, our_own


def finish(started: Started) -> Run:
    """Wait for the script's end."""
    code = started.process.wait()
    return Run(code, *(file.read_text() for file in (started.output, started.errors)))


def end_well(started: Started) -> Run:
    """Wait for the script's end, which has to be a good one."""
    run = finish(started)
    assert run.returncode == 0, run.errors[-4000:]
    return run


def report_of(started: Started) -> Any:
    """Return what a script reports that ends well."""
    return end_well(started).report
