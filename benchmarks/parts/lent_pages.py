"""Pages of one process' weights, and the process that lends them to another one."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from kvcached_core.memory.vmm.backend import Handle
from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.units import GIB
from kvcached_core.weights.sums import Sums, begin_sums_of

NUM_BYTES = 15 * GIB
BATCH_PAGES = 64  # descriptors that one message may carry
MESSAGE_BYTES = 1 << 17


class Clock:
    """Adds up what each verb takes, in milliseconds."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    def __call__(self, verb: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function, and return what it returns."""
        start = time.perf_counter()
        result = function(*args)
        self.ms[verb] = self.ms.get(verb, 0.0) + (time.perf_counter() - start) * 1e3
        return result


class Pages:
    """Handles side by side, mapped; made here, or somebody else's."""

    def __init__(self, backend: CudaBackend, num_pages: int, page_bytes: int) -> None:
        self.backend, self.page_bytes, self.clock = backend, page_bytes, Clock()
        self.num_bytes = num_pages * page_bytes
        self.address = backend.reserve(self.num_bytes)
        self.handles: list[Handle] = []

    def add(self, make: Callable[..., Handle], *args: Any) -> int:
        """Map one more handle, and return where."""
        handle = self.clock("create", make, *args)
        address = self.address + len(self.handles) * self.page_bytes
        self.clock("map", self.backend.map, address, handle)
        self.handles.append(handle)
        return address

    def sums(self) -> list[Sums]:
        """Return the sums of all pages."""
        whole = self.backend.tensor(self.address, self.num_bytes)
        return begin_sums_of(whole, len(self.handles))()

    def close(self) -> None:
        """Give all of them back."""
        torch.cuda.synchronize()
        for index, handle in enumerate(self.handles):
            address = self.address + index * self.page_bytes
            self.clock("unmap", self.backend.unmap, address, handle)
            self.clock("release", self.backend.release, handle)
        self.backend.free(self.address, self.num_bytes)


class Lender:
    """Does what the other process says."""

    def __init__(self, line: socket.socket, ordinal: int) -> None:
        torch.cuda.set_device(ordinal)
        self.line, self.ordinal = line, ordinal
        self.end_load = threading.Event()
        self.pages: Pages | None = None

    def run(self) -> None:
        """Serve until the other process hangs up."""
        while message := self.line.recv(MESSAGE_BYTES):
            order = json.loads(message)
            answer = getattr(self, order.pop("do"))(**order)
            if answer is not None:
                self.line.send(json.dumps(answer).encode())

    def make(self, *, page_bytes: int, is_sharing: bool) -> dict[str, Any]:
        """Have pages full of random words."""
        backend = CudaBackend(self.ordinal, is_sharing=is_sharing)
        num_pages = NUM_BYTES // page_bytes
        self.pages = Pages(backend, num_pages, page_bytes)
        for _ in range(num_pages):
            self.pages.add(backend.create, page_bytes)
        words = backend.tensor(self.pages.address, NUM_BYTES).view(torch.int64)
        words.random_(-(1 << 62), 1 << 62)
        return {"ms": self.pages.clock.ms, "sums": self.pages.sums(), "pid": os.getpid()}

    def send(self, *, first: int) -> None:
        """Send descriptors of the pages from `first` on."""
        pages, clock = self._made, Clock()
        fds: list[int] = []
        try:
            fds.extend(
                clock("export", pages.backend.export_handle, handle)
                for handle in pages.handles[first : first + BATCH_PAGES]
            )
            clock("send", socket.send_fds, self.line, [json.dumps(clock.ms).encode()], fds)
        finally:
            for fd in fds:
                os.close(fd)

    def load(self, *, is_on: bool) -> dict[str, Any]:
        """Begin to run kernels, or end it."""
        self.end_load.set()
        if is_on:
            self.end_load = threading.Event()
            threading.Thread(target=self._load, args=(self.end_load,), daemon=True).start()
        return {}

    def drop(self) -> dict[str, Any]:
        """Give the pages back."""
        self._made.close()
        return {"ms": self._made.clock.ms}

    @property
    def _made(self) -> Pages:
        if self.pages is None:
            raise ValueError("there are no pages yet")
        return self.pages

    def _load(self, end: threading.Event) -> None:
        a = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
        while not end.is_set():
            for _ in range(100):  # short kernels: the interpreter is what is busy
                a @ a
            sum(range(20_000))
            torch.cuda.synchronize()
