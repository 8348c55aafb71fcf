"""One engine's server as a child process: started, waited for, stopped, and gone."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx

from kvcached_core.errors import KVCachedError
from kvcached_demo.harness.load import SGLANG, VLLM, Burst, Completion, send

HOST_OPTIONS = (
    *("--dtype", "float32", "--block-size", "32", "--max-model-len", "2048"),
    "--enforce-eager",
)
SGLANG_HOST_OPTIONS = (
    *("--device", "cpu", "--dtype", "float32", "--context-length", "2048"),
    *("--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-cuda-graph", "--skip-server-warmup", "--skip-tokenizer-init"),
    *("--grammar-backend", "none", "--log-level", "info"),
)
LOG_LINES = 30
PORTS = range(10_000, 32_000)
STOP_SECONDS = 20.0


class ServerError(KVCachedError, RuntimeError):
    """A server ended, or did not answer in time; the message holds the end of its log."""


class EngineServer:
    """An engine's server of one model: `vllm serve`, and others as subclasses.

    Args:
        name: The instance's name, also the name under which the model is served.
        model: The model's folder.
        workspace: Where its log goes; also its folder for temporary files.
        environ: Variables on top of this process's own.
        arguments: Arguments on top of those every demo server has.
        core: The processor core that its compute threads are bound to.
        options: What every demo server has instead of the engine's defaults.
        python: The interpreter of the environment that the engine is installed in.
    """

    dialect = VLLM
    host_options: tuple[str, ...] = HOST_OPTIONS

    def __init__(
        self,
        name: str,
        model: Path,
        workspace: Path,
        *,
        environ: Mapping[str, str],
        arguments: tuple[str, ...] = (),
        core: int = 0,
        options: tuple[str, ...] | None = None,
        python: str = sys.executable,
    ) -> None:
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = workspace / f"{name}.log"
        options = self.host_options if options is None else options
        command = [python, *self.words(model), *options, *arguments]
        variables = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "SGLANG_USE_CPU_ENGINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": str(core % (os.cpu_count() or 1)),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(workspace),
            **environ,
        }
        self.process = self.start_process(command, variables)

    def start_process(
        self, command: list[str], environ: Mapping[str, str]
    ) -> "subprocess.Popen[bytes]":
        """Start the first process, the leader of a session, with its output in `log`."""
        with self.log.open("wb") as log:
            return subprocess.Popen(
                command,
                env=environ,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def words(self, model: Path) -> list[str]:
        """Return what the interpreter is given, up to the options."""
        return [
            *("-m", "vllm.entrypoints.cli.main", "serve", str(model)),
            *("--served-model-name", self.name, "--host", "127.0.0.1", "--port", str(self.port)),
            "--disable-uvicorn-access-log",
        ]

    async def send(self, burst: Burst) -> list[Completion]:
        """Send a burst and wait for all answers."""
        return await send(self.url, self.name, burst, self.dialect)

    def wait_ready(
        self, timeout_seconds: float = 300.0, tick: Callable[[], None] = lambda: None
    ) -> None:
        """Wait until the server answers; call `tick` about twice a second meanwhile.

        Raises:
            ServerError: If it ends or takes too long.
        """
        deadline = time.monotonic() + timeout_seconds
        while not self.is_ready():
            if self.process.poll() is not None:
                raise ServerError(self._report(f"ended with exit code {self.process.returncode}"))
            if time.monotonic() > deadline:
                raise ServerError(self._report(f"was not ready in {timeout_seconds:.0f} s"))
            tick()
            time.sleep(0.5)

    def is_ready(self) -> bool:
        """Return whether the server answers."""
        try:
            return httpx.get(f"{self.url}/health", timeout=2.0).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        """End the server and all its processes: politely, then not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End every process of the server at once, as `kill -9` does."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def tail(self) -> str:
        """Return the end of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _report(self, what: str) -> str:
        return f"the server {self.name!r} {what}; its log ends with\n{self.tail()}"


class SGLangServer(EngineServer):
    """`sglang.launch_server` of one model."""

    dialect = SGLANG
    host_options = SGLANG_HOST_OPTIONS

    def words(self, model: Path) -> list[str]:
        """See `EngineServer`."""
        return [
            *("-m", "sglang.launch_server", "--model-path", str(model)),
            *("--host", "127.0.0.1", "--port", str(self.port)),
        ]


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on.

    Connections of others take theirs from the kernel's ephemeral range while a server still starts,
    so this one lies below it.
    """
    while True:
        port = PORTS.start + secrets.randbelow(len(PORTS))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
