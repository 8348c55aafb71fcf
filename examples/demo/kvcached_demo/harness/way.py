"""What the ways to use a gateway share: one that runs, or one of its own in front of tiny models.

Each folder in `examples` that has a `cpu.yaml` has a `run.py`, which calls `run`.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from kvcached_core.errors import KVCachedError
from kvcached_core.units import default_directory
from kvcached_demo.harness.tiny import make_tiny_models
from kvcached_demo.watched import run_watched

COMMAND = Path(sys.executable).with_name("kvcached")
READY_SECONDS = 60.0
LOOK_SECONDS = 0.1
STOP_SECONDS = 60.0
LISTENING = " models at http://"
TINY = "tiny"  # beside the examples' folders


class WayError(KVCachedError, RuntimeError):
    """A gateway did not start; the message holds the end of its log."""


@dataclass(frozen=True)
class Gateway:
    """A gateway that serves.

    Attributes:
        url: Where, for example `http://127.0.0.1:8080`.
        directory: The folder of its ledgers.
        folder: Where a way may write files that the gateway's file of models names.
    """

    url: str
    directory: Path
    folder: Path

    def models(self) -> dict[str, dict[str, Any]]:
        """Return what it says of each model: `state`, `device` and `queue`."""
        data = httpx.get(f"{self.url}/v1/models").raise_for_status().json()["data"]
        return {model["id"]: model["kvcached"] for model in data}

    def await_state(self, name: str, state: str, seconds: float) -> None:
        """Wait until a model is in a state.

        Raises:
            WayError: If it is not after `seconds`.
        """
        end = time.monotonic() + seconds
        while (now := self.models()[name]["state"]) != state:
            if time.monotonic() > end:
                raise WayError(f"{name} is {now} and not {state} after {seconds:g} s")
            time.sleep(LOOK_SECONDS)

    def command(self, *words: str) -> str:
        """Run a command of `kvcached` beside it, such as `limit`; return what it says."""
        environ = os.environ | {"KVCACHED_DIR": str(self.directory)}
        done = subprocess.run(
            [COMMAND, *words], env=environ, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise WayError(f"kvcached {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()


def run(show: Callable[[Gateway], None], folder: Path) -> int:
    """Show a way at the gateway that `--url` names, or at one of its own; return the exit code.

    Args:
        show: Asks the gateway and prints what became of it.
        folder: The way's folder, with its `cpu.yaml`.
    """
    parser = argparse.ArgumentParser(prog=f"{folder.name}/run.py")
    parser.add_argument("--url", help="a gateway that serves these models; else one is started")
    url = parser.parse_args().url
    if url:
        environ = os.environ.get("KVCACHED_DIR")
        show(Gateway(url, Path(environ) if environ else default_directory(), folder))
        return 0

    def work(workspace: Path) -> int:
        make_tiny_models(folder.parent / TINY)
        with served(folder / "cpu.yaml", workspace) as gateway:
            show(gateway)
        return 0

    return run_watched(work, prefix="kvcached-way-")


@contextlib.contextmanager
def served(file: Path, workspace: Path) -> Iterator[Gateway]:
    """Serve a file of models with `kvcached serve` until the block ends.

    Args:
        file: The file; its `listen` may name port 0.
        workspace: A folder for the ledgers and a log; its path has to be short.

    Raises:
        WayError: If it does not serve.
    """
    directory, log = workspace / "kv", workspace / "gateway.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [COMMAND, "serve", file],
            env=os.environ | {"KVCACHED_DIR": str(directory)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Gateway(_await_url(process, log), directory, file.parent)
    finally:
        process.terminate()
        process.wait(STOP_SECONDS)


def _await_url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        _, found, rest = log.read_text().partition(LISTENING)
        if found:
            return f"http://{rest.partition('/')[0]}"
        time.sleep(LOOK_SECONDS)
    raise WayError(f"the gateway does not serve; its log ends with:\n{log.read_text()[-2000:]}")
