"""Run as a script: imports an engine once, then forks a process of it for each request.

    python warm_parent.py CHANNEL MODULE...

`CHANNEL` is the number of a socket; this process ends when its other end is closed. A process that
is asked for differs from one that was started in what it has imported already, and in nothing else:
it has the environment, folder and descriptors of the request, a session and a parent as it would
have. What it spawns by multiprocessing is forked, too, by a twin from before it did anything.
"""

import array
import ctypes
import fcntl
import gc
import json
import multiprocessing.util
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

MAX_MESSAGE_BYTES = 1 << 20
MAX_DESCRIPTORS = 64
FIRST_FREE_DESCRIPTOR = 500
SECONDS_TO_FORK = 60.0
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

Program = Callable[[], object]
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Request:
    """What to become: the words after the interpreter, and where the descriptors belong."""

    words: list[str]
    environ: dict[str, str]
    directory: str
    numbers: list[int]

    def become(self, descriptors: Sequence[int]) -> Program:
        """Make this process the one that is asked for, and return what it runs."""
        os.environ.clear()
        os.environ.update(self.environ)
        os.chdir(self.directory)
        place(descriptors, self.numbers)
        tempfile.tempdir = None
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        paths = self.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[1:1] = [path for path in paths if path and path not in sys.path]
        logs = sys.modules.get("vllm.logger")
        if logs is not None and not hasattr(logs, "configure_logging"):
            logs._configure_vllm_root_logger()  # older releases read the environment at import
        sys.orig_argv = [sys.executable, *self.words]
        first, second, *more = [*self.words, ""]
        if first == "-m":
            sys.path[0] = self.directory
            sys.argv = ["-m", *more[:-1]]
            return lambda: runpy.run_module(second, run_name="__main__", alter_sys=True)
        if first.startswith("-"):  # options such as -B, then -c: so multiprocessing spawns
            code = self.words[self.words.index("-c") + 1]
            sys.path[0] = ""
            sys.argv = ["-c", *self.words[self.words.index("-c") + 2 :]]
            main = sys.modules["__main__"] = ModuleType("__main__")
            return lambda: exec(code, vars(main))  # noqa: S102  as the interpreter does
        sys.path[0] = str(Path(first).parent)
        sys.argv = list(self.words)
        return lambda: runpy.run_path(first, run_name="__main__")


def place(descriptors: Sequence[int], numbers: Sequence[int]) -> None:
    """Give each descriptor its number."""
    aside = [fcntl.fcntl(each, fcntl.F_DUPFD, FIRST_FREE_DESCRIPTOR) for each in descriptors]
    for each in descriptors:
        os.close(each)
    for each, number in zip(aside, numbers, strict=True):
        os.dup2(each, number)
        os.close(each)


def send(channel: socket.socket, message: Any, descriptors: Sequence[int] = ()) -> None:
    """Send a message with descriptors."""
    rights = array.array("i", descriptors)
    extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
    channel.sendmsg([json.dumps(message).encode()], extra)


def receive(channel: socket.socket) -> tuple[Any, list[int]]:
    """Return the next message and its descriptors; None when the other end is gone."""
    room = socket.CMSG_LEN(MAX_DESCRIPTORS * array.array("i").itemsize)
    data, extra, _, _ = channel.recvmsg(MAX_MESSAGE_BYTES, room)
    descriptors = array.array("i")
    for _, _, rights in extra:
        descriptors.frombytes(rights)
    return (json.loads(data) if data else None), list(descriptors)


class Parent:
    """Forks a server for each request; `run` returns in the servers only."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._status_of: dict[int, int] = {}  # by pidfd

    def run(self) -> Program:
        """Serve until the other end is gone; in a server, return what it is to run."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor != self._channel.fileno():
                    poll.unregister(descriptor)
                    self._report_end(descriptor)
                    continue
                message, descriptors = receive(self._channel)
                if message is None:
                    sys.exit()  # and the kernel ends the servers
                *descriptors, status = descriptors
                check_threads()
                parent, pid = os.getpid(), os.fork()
                if pid == 0:
                    for each in (*self._status_of, *self._status_of.values(), status):
                        os.close(each)
                    self._channel.close()
                    os.setsid()
                    end_with_parent(parent)
                    return start(Request(**message), descriptors)
                for each in descriptors:
                    os.close(each)
                with suppress(BrokenPipeError):
                    os.write(status, f"{pid}\n".encode())
                watched = os.pidfd_open(pid)
                self._status_of[watched] = status
                poll.register(watched, select.POLLIN)

    def _report_end(self, watched: int) -> None:
        ended = os.waitid(os.P_PIDFD, watched, os.WEXITED)
        assert ended is not None
        is_exit = ended.si_code == os.CLD_EXITED
        status = self._status_of.pop(watched)
        # Whoever wanted it may have forgotten it since: nobody reads then.
        with suppress(BrokenPipeError):
            os.write(status, f"{ended.si_status if is_exit else -ended.si_status}\n".encode())
        os.close(status)
        os.close(watched)


def start(request: Request, descriptors: list[int]) -> Program:
    """Keep a twin of this new process for what it will spawn, then become what is asked for."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    original = os.getpid()
    if os.fork() == 0:
        ours.close()
        end_with_parent(original)
        for each in descriptors:
            os.close(each)
        return twin(theirs, original)
    theirs.close()
    kept = socket.socket(fileno=fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, 2 * FIRST_FREE_DESCRIPTOR))
    ours.close()
    kept.settimeout(SECONDS_TO_FORK)
    spawn, lock = multiprocessing.util.spawnv_passfds, threading.Lock()

    def fork_instead(path: Any, words: Sequence[Any], passed: Sequence[int]) -> int:
        if "--multiprocessing-fork" not in words:
            return spawn(path, words, passed)
        numbers = sorted({0, 1, 2, *passed})
        message = Request(list(words[1:]), dict(os.environ), os.getcwd(), numbers)  # noqa: PTH109
        with lock:
            send(kept, vars(message), numbers)
            pid, _ = receive(kept)
        if pid is None:
            raise RuntimeError("the twin that forks for this process has ended")
        return int(pid)

    multiprocessing.util.spawnv_passfds = fork_instead
    return request.become(descriptors)


def twin(channel: socket.socket, original: int) -> Program:
    """Fork children of the process `original`; return in such a child only."""
    while True:
        message, descriptors = receive(channel)
        if message is None:
            os._exit(0)
        check_threads()
        pid_reader, pid_writer = os.pipe()
        gate, opener = os.pipe()
        between = os.fork()
        if between:
            for each in (pid_writer, gate, *descriptors):
                os.close(each)
            os.waitpid(between, 0)  # from now on the child is the original's, which may wait for it
            os.close(opener)
            with open(pid_reader) as pipe:  # noqa: PTH123  a descriptor
                send(channel, int(pipe.read()))
            continue
        pid = os.fork()
        if pid:
            os.write(pid_writer, str(pid).encode())
            os._exit(0)
        channel.close()
        for each in (pid_reader, pid_writer, opener):
            os.close(each)
        os.read(gate, 1)
        os.close(gate)
        end_with_parent(original)
        return start(Request(**message), descriptors)


def end_with_parent(parent: int) -> None:
    """Let the kernel end this process with its parent, so that a killed test run leaves nothing.

    Args:
        parent: Its process id; one that has ended already takes this process with it, too.
    """
    _libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def check_threads() -> None:
    """Refuse to fork beside another thread: the child would have its locks, and not it."""
    tasks = Path("/proc/self/task").iterdir()
    names = [(task / "comm").read_text() for task in tasks]
    if threading.active_count() != 1 or len(names) != 1:
        sys.exit(f"the warm parent has threads: {names} {threading.enumerate()}")


def main() -> Program:
    """Import what is named, then serve requests."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        import_module(name)
    check_threads()
    gc.collect()
    gc.freeze()
    send(channel, "ready")
    return Parent(channel).run()


if __name__ == "__main__":
    main()()
