"""Engine processes that are forked from a parent which has imported the engine once.

A cold start imports for ten seconds in each of up to three processes; this takes that away and
leaves the rest as it is (see `warm_parent`). One parent is kept for each set of what is read at
import, as long as this process lives.
"""

import atexit
import contextlib
import functools
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from helpers.warm_parent import SECONDS_TO_FORK, Request, receive, send

SCRIPT = Path(__file__).with_name("warm_parent.py")
SECONDS_TO_IMPORT = 300.0
SECONDS_TO_RUN = 300.0
# What libraries read when they are imported: processes that differ in it have different parents.
READ_AT_IMPORT = {
    "vllm": ("OMP_NUM_THREADS",),
    "sglang": ("OMP_NUM_THREADS", "SGLANG_USE_CPU_ENGINE", "TRITON_INTERPRET"),
}
# Processes of SGLang that a test starts with no server's variables have these of a server, so that
# all share a parent.
SGLANG_ENVIRON = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",
}
MODULES = {
    "vllm": (
        "vllm.entrypoints.cli.serve",
        "vllm.entrypoints.openai.api_server",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
        "vllm.model_executor.models.llama",
    ),
    "sglang": (
        "sglang.srt.entrypoints.http_server",
        "sglang.srt.managers.scheduler",
        "sglang.srt.managers.detokenizer_manager",
        "sglang.srt.models.registry",
    ),
}


class NurseryError(RuntimeError):
    """A warm parent did not start, or has ended; the message holds the end of what it said."""


class WarmProcess:
    """A process of the nursery, with the part of `subprocess.Popen` that servers need.

    Attributes:
        pid: Its process id; it leads a session and a process group.
        returncode: As `Popen` has it; None while it runs.
    """

    def __init__(self, nursery: "Nursery", status: int) -> None:
        self._nursery = nursery
        self._status = open(status)  # noqa: SIM115  a pipe that lives as long as this does
        self.returncode: int | None = None
        self.pid = self._next_number(SECONDS_TO_FORK)

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            TimeoutExpired: If it still runs after `timeout` seconds.
        """
        if self.returncode is None:
            self.returncode = self._next_number(timeout)
            self._status.close()
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to this process alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def __del__(self) -> None:
        self._status.close()

    def _next_number(self, timeout: float | None) -> int:
        if not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a process of the nursery", timeout or 0)
        line = self._status.readline()
        if not line:
            raise NurseryError(self._nursery.ending())
        return int(line)


class Nursery:
    """A parent with an engine's modules imported.

    Args:
        python: The interpreter of the engine's environment.
        modules: What to import.
        environ: The parent's own environment.

    Raises:
        NurseryError: If the modules cannot be imported, or start threads.
    """

    def __init__(self, python: str, modules: Sequence[str], environ: Mapping[str, str]) -> None:
        descriptor, path = tempfile.mkstemp(prefix="kvcached-nursery-")
        self._log = Path(path)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, open(descriptor, "w") as log:  # noqa: PTH123  a descriptor
            self._process = subprocess.Popen(
                [python, SCRIPT, str(theirs.fileno()), *modules],
                env={**environ, "PYTHONDONTWRITEBYTECODE": ""},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        start = time.monotonic()
        self._channel.settimeout(SECONDS_TO_IMPORT)
        try:
            said, _ = receive(self._channel)
        except TimeoutError:
            said = None
        if said is None:
            raise NurseryError(self.ending())
        self.seconds_to_import = time.monotonic() - start

    def start(
        self, words: Sequence[str], environ: Mapping[str, str], output: int, errors: int
    ) -> WarmProcess:
        """Start a process.

        Args:
            words: What the interpreter would be given.
            environ: Its whole environment.
            output: The descriptor of its standard output.
            errors: That of its standard error.

        Raises:
            NurseryError: If the parent has ended.
        """
        request = Request(list(words), dict(environ), os.getcwd(), [0, 1, 2])  # noqa: PTH109
        reader, writer = os.pipe()
        with open(os.devnull) as nothing:  # noqa: PTH123  a descriptor
            try:
                send(self._channel, vars(request), [nothing.fileno(), output, errors, writer])
            except OSError as error:
                raise NurseryError(self.ending()) from error
            finally:
                os.close(writer)
        return WarmProcess(self, reader)

    def ending(self) -> str:
        """Say how the parent ended, for an error; end it if it has not."""
        self._end()
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        self.close()
        return f"the warm parent ended with {self._process.returncode}:\n{text[-3000:]}"

    def close(self) -> None:
        """End the parent and, with it, what it started."""
        self._end()
        self._log.unlink(missing_ok=True)

    def _end(self) -> None:
        self._channel.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start_warm(
    engine: str,
    words: Sequence[str],
    environ: Mapping[str, str],
    *,
    output: int,
    errors: int,
    python: str = sys.executable,
) -> WarmProcess:
    """Start a process of `engine` from the parent that fits its environment."""
    read_at_import = tuple((name, environ.get(name)) for name in READ_AT_IMPORT[engine])
    return nursery(engine, python, read_at_import).start(words, environ, output, errors)


def run_warm(
    engine: str, words: Sequence[str], environ: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run a process of `engine` to its end, as `subprocess.run` does."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = start_warm(engine, words, environ, output=output.fileno(), errors=errors.fileno())
        code = process.wait(SECONDS_TO_RUN)
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(list(words), code, output.read(), errors.read())


@functools.cache
def nursery(
    engine: str, python: str, read_at_import: tuple[tuple[str, str | None], ...]
) -> Nursery:
    """Return the parent for what `engine` reads at import, started on first use."""
    changed = {name for name, _ in read_at_import}
    environ = {name: value for name, value in os.environ.items() if name not in changed}
    parent = Nursery(
        python,
        MODULES[engine],
        environ
        | {name: value for name, value in read_at_import if value is not None}
        | {"ENABLE_KVCACHED": "0", "VLLM_NO_USAGE_STATS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    atexit.register(parent.close)
    return parent
