"""Engines in processes of their own, and how they ended."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.server import ENGINE_ENVIRON

if TYPE_CHECKING:
    import subprocess

    from helpers.nursery import WarmProcess

TESTS = Path(__file__).parents[1]
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


def finish(started: Started) -> Run:
    """Wait for the script's end."""
    code = started.process.wait()
    return Run(code, *(file.read_text() for file in (started.output, started.errors)))
