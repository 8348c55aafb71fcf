"""Streams and events on a host, as far as SGLang's copies between device and host use them.

torch has names for them that do nothing there. These run what they are given in a thread each, in
order, after a delay, so copies are as open as on a GPU.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Work = Callable[[], None]


class Gate:
    """While a file exists, no copy is done until somebody waits for one.

    Args:
        path: The file; None for a gate that is never shut.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._is_awaited = threading.Event()

    def pass_through(self) -> None:
        """Return when the gate is open."""
        while self._path is not None and self._path.exists():
            if self._is_awaited.wait(0.01):
                return

    def open(self) -> None:
        """Let all through that was begun: somebody waits for it."""
        self._is_awaited.set()

    def shut_again(self) -> None:
        """Have the file count again."""
        self._is_awaited.clear()


class Stream:
    """What runs what it is given in a thread of its own."""

    def __init__(self, module: "HostStreams") -> None:
        self._module = module
        self._work: deque[Work] = deque()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def give(self, work: Work) -> None:
        with self._changed:
            self._work.append(work)
            self._changed.notify_all()

    def synchronize(self) -> None:
        event = Event(self._module)
        event.record(self)
        event.synchronize()

    def wait_stream(self, stream: Any) -> None:
        if isinstance(stream, Stream):  # the others of a host have nothing that is open
            event = Event(self._module)
            event.record(stream)
            event.wait(self)

    def wait_event(self, event: "Event") -> None:
        event.wait(self)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work)
                work = self._work.popleft()
            work()


class Event:
    """A point in a stream; one that was never recorded is behind nothing."""

    def __init__(self, module: "HostStreams") -> None:
        self._module = module
        self._reached = threading.Event()
        self._reached.set()
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        stream = stream or self._module.current_stream()
        if isinstance(stream, Stream):
            self._reached.clear()
            stream.give(self._reach)
        else:
            self._reach()

    def query(self) -> bool:
        return self._reached.is_set()

    def synchronize(self) -> None:
        if not self._reached.is_set():
            self._module.gate.open()
            self._reached.wait()
            self._module.gate.shut_again()

    def wait(self, stream: Any = None) -> None:
        stream = stream or self._module.current_stream()
        if isinstance(stream, Stream):
            stream.give(self._reached.wait)  # type: ignore[arg-type]  what it returns is dropped
        else:
            self.synchronize()

    def elapsed_time(self, other: "Event") -> float:
        return (other._at - self._at) * 1000

    def _reach(self) -> None:
        self._at = time.perf_counter()
        self._reached.set()


class HostStreams:
    """Stands in for `torch.cpu` where SGLang copies.

    Args:
        delay_ms: The range of the delay of each copy.
        seed: What it is drawn with.
        gate: What may leave copies open.
    """

    def __init__(self, delay_ms: tuple[float, float], seed: int, gate: Gate) -> None:
        self.gate = gate
        self._delay_ms = delay_ms
        self._random = random.Random(seed)
        self._current: Stream | None = None

    def Stream(self, *_: Any, **__: Any) -> Stream:  # noqa: N802  as torch calls it
        return Stream(self)

    def Event(self, *_: Any, **__: Any) -> Event:  # noqa: N802  as torch calls it
        return Event(self)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def current_stream(self) -> Any:
        return self._current if self._current is not None else self

    def wait_event(self, event: Event) -> None:
        """Wait as the host's own stream: there all is done when it was given."""
        event.synchronize()

    def copy_later(self, copy: Work) -> None:
        """Have the current stream copy, a while after all that it has."""
        assert self._current is not None, "a copy belongs to a stream"
        seconds = self._random.uniform(*self._delay_ms) / 1000

        def work() -> None:
            time.sleep(seconds)  # a slow link: nothing is awaited
            self.gate.pass_through()
            copy()

        self._current.give(work)
