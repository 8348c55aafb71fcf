"""One engine's server as a child process: started, waited for, asked, stopped, and gone."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import httpx

from kvcached_core.errors import KVCachedError
from kvcached_demo.harness.load import Burst, Completion, send
from kvcached_demo.harness.plan import Plan

# What every process of an engine that we start has.
ENGINE_ENVIRON = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
ASK_SECONDS = 60.0
LOG_LINES = 30
LOOK_SECONDS = 0.1
PORTS = range(10_000, 32_000)
READY_SECONDS = 300.0
STOP_SECONDS = 20.0


class ServerError(KVCachedError, RuntimeError):
    """A server ended, or did not answer in time; the message holds the end of its log."""


class Process(Protocol):
    """What a server needs of its first process, as `subprocess.Popen` has it."""

    @property
    def pid(self) -> int:
        """Its id; it leads a process group."""

    @property
    def returncode(self) -> int | None:
        """How it ended, or None."""

    def poll(self) -> int | None:
        """Return how it ended, or None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""

    def send_signal(self, number: signal.Signals, /) -> None:
        """Send it a signal."""


# Starts a plan's first process, the leader of a session: from the plan, the command, all variables
# and the file that its output goes to.
Launch = Callable[[Plan, list[str], Mapping[str, str], Path], Process]


def start_cold(
    _plan: Plan, command: list[str], environ: Mapping[str, str], log: Path
) -> "subprocess.Popen[bytes]":
    """Start a process as users do."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


class EngineServer:
    """An engine's server of one model.

    Args:
        plan: How it is started.
        model: The model's folder.
        workspace: Where its log goes; also its folder for temporary files.
        core: The processor core that its compute threads are bound to.
        launch: What starts its process.
    """

    def __init__(
        self,
        plan: Plan,
        model: Path,
        workspace: Path,
        *,
        core: int = 0,
        launch: Launch = start_cold,
    ) -> None:
        self.name = plan.name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = workspace / f"{plan.name}.log"
        self._dialect = plan.engine.dialect
        serving = plan.engine.serving(model, plan.name, self.port)
        command = [plan.engine.python, *serving, *plan.options, *plan.arguments]
        environ = {
            **os.environ,
            **ENGINE_ENVIRON,
            "SGLANG_USE_CPU_ENGINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": str(core % (os.cpu_count() or 1)),
            "TMPDIR": str(workspace),
            **plan.environ,
        }
        self.process = launch(plan, command, environ, self.log)

    async def send(self, burst: Burst) -> list[Completion]:
        """Send a burst and wait for all answers."""
        return await send(self.url, self.name, burst, self._dialect)

    def post(self, path: str, body: Any = None, seconds: float = ASK_SECONDS) -> httpx.Response:
        """Post to the server; what it answers may be an error."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=seconds)

    def metric(self, name: str) -> float:
        """Return one of the server's own metrics, or not a number if it has none of that name."""
        for line in httpx.get(f"{self.url}/metrics", timeout=ASK_SECONDS).text.splitlines():
            if line.startswith(name):
                return float(line.rsplit(" ", 1)[1])
        return float("nan")

    def wait_ready(
        self, seconds: float = READY_SECONDS, tick: Callable[[], None] = lambda: None
    ) -> None:
        """Wait until the server answers; see `wait_ready`."""
        wait_ready([self], seconds, tick)

    def is_ready(self) -> bool:
        """Return whether the server answers."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 2.0):
                pass  # a client that asks costs more, and most of the time nobody listens yet
            return httpx.get(f"{self.url}/health", timeout=2.0).status_code == httpx.codes.OK
        except (OSError, httpx.HTTPError):
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
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def report(self, what: str) -> str:
        """Return what became of it, with the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join([f"the server {self.name!r} {what}; its log ends with", *lines])


def wait_ready(
    servers: Iterable[EngineServer],
    seconds: float = READY_SECONDS,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Wait until all servers answer; return after how many seconds from now each did.

    Args:
        servers: Whom to wait for.
        seconds: How long at most.
        tick: Called a few times a second meanwhile.

    Raises:
        ServerError: If one ends or takes too long.
    """
    start = time.monotonic()
    waiting = list(servers)
    ready: dict[str, float] = {}
    while True:
        ready |= {server.name: time.monotonic() - start for server in waiting if server.is_ready()}
        waiting = [server for server in waiting if server.name not in ready]
        if not waiting:
            return ready
        for server in waiting:
            if server.process.poll() is not None:
                code = server.process.returncode
                raise ServerError(server.report(f"ended with exit code {code}"))
        if time.monotonic() - start > seconds:
            raise ServerError(waiting[0].report(f"was not ready in {seconds:.0f} s"))
        tick()
        time.sleep(LOOK_SECONDS)


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
