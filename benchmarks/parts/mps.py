"""NVIDIA's MPS daemon, started by a user for a block: its folders, what it says, and its end."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
DEVICES = "CUDA_VISIBLE_DEVICES"
SHARE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
SHORT_FOLDER = "/tmp"  # noqa: S108  its sockets need a short path
UP_SECONDS, ASK_SECONDS, END_SECONDS, PROBE_SECONDS = 20.0, 10.0, 10.0, 90.0
LOOK_SECONDS = 0.1
NUM_LOG_CHARACTERS = 1500
PROBE = "import torch; print(torch.ones(8, device='cuda').sum().item())"


class MpsError(RuntimeError):
    """The daemon cannot be had here; the message says why, with the end of its log."""


class Daemon:
    """A daemon that runs.

    Args:
        folder: Of its sockets and its logs.

    Attributes:
        environ: What makes a process its client.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.environ = {PIPES: str(folder / "pipe"), LOGS: str(folder / "log")}
        for path in self.environ.values():
            Path(path).mkdir()
        # A daemon numbers the devices that it is shown anew: it sees all, and clients choose.
        self._own = {name: value for name, value in os.environ.items() if name != DEVICES}
        self._process = subprocess.Popen(
            [CONTROL, "-f"],
            env=self._own | self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def ask(self, words: str) -> list[str]:
        """Return the lines that it answers to a command.

        Raises:
            MpsError: If it does not answer.
        """
        try:
            done = subprocess.run(
                [CONTROL],
                env=self._own | self.environ,
                input=f"{words}\n",
                capture_output=True,
                text=True,
                timeout=ASK_SECONDS,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise MpsError(f"{CONTROL} did not answer {words!r}: {error}") from None
        return done.stdout.split("\n")

    def num_clients(self) -> int:
        """Return how many processes use the device through it now."""
        servers = [line for line in self.ask("get_server_list") if line.strip().isdecimal()]
        answers = (self.ask(f"get_client_list {server.strip()}") for server in servers)
        return sum(line.strip().isdecimal() for answer in answers for line in answer)

    def wait_up(self) -> None:
        """Wait until it answers.

        Raises:
            MpsError: If it ends or takes too long.
        """
        until = time.monotonic() + UP_SECONDS
        while True:
            if self._process.poll() is not None:
                code = self._process.returncode
                raise MpsError(f"{CONTROL} -f ended with exit code {code}{self.last_words()}")
            with contextlib.suppress(MpsError):
                self.ask("get_server_list")
                return
            if time.monotonic() > until:
                words = f"did not answer within {UP_SECONDS:.0f} s"
                raise MpsError(f"{CONTROL} {words}{self.last_words()}")
            time.sleep(LOOK_SECONDS)

    def last_words(self) -> str:
        """Return the ends of its logs, or nothing."""
        logs = sorted(Path(self.environ[LOGS]).glob("*.log"))
        found = "; ".join(log.read_text(errors="replace").strip() for log in logs)
        return f": {found[-NUM_LOG_CHARACTERS:]}" if found else ""

    def end(self) -> None:
        """End it and its server: politely, then not."""
        with contextlib.suppress(MpsError):
            self.ask("quit")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def probe(environ: Mapping[str, str], python: str) -> None:
    """Let a process compute something as a client.

    Raises:
        MpsError: If it cannot.
    """
    command = [python, "-c", PROBE]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MpsError(f"a client computed nothing in {PROBE_SECONDS:.0f} s") from None
    if done.returncode:
        said = done.stderr.strip()[-NUM_LOG_CHARACTERS:]
        raise MpsError(f"a client of the daemon failed: {said}")


@contextlib.contextmanager
def running(check: Callable[[Mapping[str, str]], None]) -> Iterator[Daemon]:
    """Start a daemon for a block; behind the block it is gone, whatever happened.

    Its folders are new ones of this user, so another daemon of the machine is left alone, and no
    setting of the device is changed.

    Args:
        check: Is given a client's variables; raises `MpsError` if a client cannot compute.

    Raises:
        MpsError: If there is no daemon to start, or it may not be started, or it has no use.
    """
    if shutil.which(CONTROL) is None:
        raise MpsError(f"{CONTROL} is not there")
    with tempfile.TemporaryDirectory(prefix="mps-", dir=SHORT_FOLDER) as folder:
        daemon = Daemon(Path(folder))
        try:
            daemon.wait_up()
            try:
                check(daemon.environ)
            except MpsError as error:
                raise MpsError(f"{error}{daemon.last_words()}") from None
            yield daemon
        finally:
            daemon.end()
