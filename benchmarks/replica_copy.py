"""What it takes to copy weights out of another process' memory on the GPU beside.

    python benchmarks/replica_copy.py --json benchmarks/results/replica_copy.json

One process has pages on the first GPU and sends descriptors of them; the other imports, maps and
copies them to the second, and compares their sums. In turn each sees both GPUs, or only its own;
the first runs nothing, or kernels out of a busy interpreter; last it is killed before the copy.
Needs two GPUs with 17 GiB free each; `--devices 0 0` rehearses on one.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from link import gigabytes_per_second
from machine import describe_gpu
from record import write

from kvcached_core.errors import BackendError
from kvcached_core.memory.vmm.backend import Handle
from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.units import GIB, MIB
from kvcached_core.weights.sums import Sums, begin_sums_of

NUM_BYTES = 15 * GIB
PAGE_MIB = (64, 256)
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


class Reader:
    """Copies the lender's pages to the device of this process."""

    def __init__(self, line: socket.socket, ordinal: int) -> None:
        torch.cuda.set_device(ordinal)
        self.line, self.backend = line, CudaBackend(ordinal, is_sharing=True)

    def order(self, do: str, **words: Any) -> Any:
        """Have the lender do something, and return its answer."""
        self.line.send(json.dumps({"do": do, **words}).encode())
        return json.loads(self.line.recv(MESSAGE_BYTES))

    def copy(self, made: dict[str, Any], page_bytes: int, *, kill: bool = False) -> dict[str, Any]:
        """Return what it took to have all pages of the lender, and whether they are right."""
        backend, num_pages = self.backend, NUM_BYTES // page_bytes
        clock, lent_ms = Clock(), Clock()
        start = time.perf_counter()
        ours, theirs = (Pages(backend, num_pages, page_bytes) for _ in range(2))
        for first in range(0, num_pages, BATCH_PAGES):
            self.line.send(json.dumps({"do": "send", "first": first}).encode())
            text, fds, _, _ = clock(
                "receive", socket.recv_fds, self.line, MESSAGE_BYTES, BATCH_PAGES
            )
            for verb, ms in json.loads(text).items():
                lent_ms.ms[verb] = lent_ms.ms.get(verb, 0.0) + ms
            for fd in fds:
                theirs.add(backend.import_handle, fd, page_bytes)
                os.close(fd)
            if kill:
                continue
            for index in range(first, first + len(fds)):
                address = ours.add(backend.create, page_bytes)
                source = theirs.address + index * page_bytes
                clock("begin_copy", backend.copy_between, address, source, page_bytes)
        result: dict[str, Any] = {}
        if kill:
            os.kill(made["pid"], signal.SIGKILL)
            time.sleep(1)
            for index in range(num_pages):
                address = ours.add(backend.create, page_bytes)
                backend.copy_between(address, theirs.address + index * page_bytes, page_bytes)
        begun = time.perf_counter()
        clock("finish_copies", backend.finish_copies)
        copied = time.perf_counter()
        sums = ours.sums()
        summed = time.perf_counter()
        again = []
        for _ in range(3):
            at = time.perf_counter()
            backend.copy_between(ours.address, theirs.address, NUM_BYTES)
            backend.finish_copies()
            again.append((time.perf_counter() - at) * 1e3)
        theirs.close()
        ours.close()
        result |= {
            "is_right": [tuple(one) for one in made["sums"]] == sums,
            "begun_ms": (begun - start) * 1e3,
            "copied_ms": (copied - start) * 1e3,
            "sums_ms": (summed - copied) * 1e3,
            "copy_again_ms": statistics.median(again),
            "copy_gb_per_second": NUM_BYTES / statistics.median(again) / 1e6,
            "reader_ms": clock.ms,
            "lender_ms": lent_ms.ms,
            "imported_ms": theirs.clock.ms,
            "own_ms": ours.clock.ms,
        }
        return result

    def run(self, *, is_whole: bool) -> dict[str, Any]:
        """Measure all, or one size of pages alone."""
        found: dict[str, Any] = {}
        if is_whole:
            found["link_gb_per_second"] = gigabytes_per_second((torch.cuda.current_device(),))
        for page_mib in PAGE_MIB if is_whole else PAGE_MIB[:1]:
            page_bytes = page_mib * MIB
            found[f"{page_mib} MiB"] = row = {}
            if is_whole:  # what they cost where nobody may import them
                plain = self.order("make", page_bytes=page_bytes, is_sharing=False)["ms"]
                row["plain_ms"] = plain | self.order("drop")["ms"]
            made = self.order("make", page_bytes=page_bytes, is_sharing=True)
            for name, is_busy in (("first", False), ("idle", False), ("busy", True)):
                self.order("load", is_on=is_busy)
                row[name] = self.copy(made, page_bytes)
            self.order("load", is_on=False)
            row["sharing_ms"] = made["ms"] | self.order("drop")["ms"]
        if is_whole:
            page_bytes = PAGE_MIB[0] * MIB
            made = self.order("make", page_bytes=page_bytes, is_sharing=True)
            found["killed"] = self.copy(made, page_bytes, kill=True)
        return found


def measure(devices: list[int], *, is_apart: bool) -> dict[str, Any]:
    """Return what two processes found that see both GPUs, or only their own."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    children = []
    for role, end, device in zip(("lender", "reader"), ends, devices, strict=True):
        environ = dict(os.environ)
        if is_apart:
            environ["CUDA_VISIBLE_DEVICES"] = str(device)
        words = ["--role", role, "--socket", str(end.fileno())]
        words += ["--devices", *(["0"] if is_apart else [str(device)])]
        words += [] if is_apart else ["--whole"]
        children.append(
            subprocess.Popen(
                [sys.executable, __file__, *words],
                env=environ,
                pass_fds=[end.fileno()],
                stdout=subprocess.PIPE if role == "reader" else None,
                text=True,
            )
        )
        end.close()
    lender, reader = children
    output, _ = reader.communicate()
    lender.kill()
    lender.wait()
    lines = output.splitlines()
    return json.loads(lines[-1]) if lines else {"error": f"the reader ended: {reader.returncode}"}


def table(results: dict[str, Any]) -> str:
    """Return what happened, a line each."""
    lines = []
    for sight in ("both", "apart"):
        found = results.get(sight, {})
        if "error" in found:
            lines.append(f"{sight}: {found['error']}")
        for name, row in found.items():
            for run in ("first", "idle", "busy"):
                if isinstance(row, dict) and run in row:
                    one = row[run]
                    lines.append(
                        f"{sight}, pages of {name}, {run}: all copied after "
                        f"{one['copied_ms']:.1f} ms, sums {one['sums_ms']:.1f} ms, a copy alone "
                        f"{one['copy_gb_per_second']:.0f} GB/s, right {one['is_right']}; export "
                        f"{one['lender_ms']['export']:.1f}, import and map "
                        f"{sum(one['imported_ms'][verb] for verb in ('create', 'map')):.1f}, drop "
                        f"{sum(one['imported_ms'][verb] for verb in ('unmap', 'release')):.1f} ms"
                    )
        if "killed" in found:
            lines.append(f"{sight}: right after a kill {found['killed']['is_right']}")
        if "link_gb_per_second" in found:
            lines.append(f"the link to host memory: {found['link_gb_per_second']:.1f} GB/s")
    return "\n".join(lines)


def main() -> None:
    """Measure, or be one of the two processes."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--json", type=Path)
    made.add_argument("--devices", type=int, nargs="+", default=[0, 1])
    made.add_argument("--role", choices=("lender", "reader"), help=argparse.SUPPRESS)
    made.add_argument("--socket", type=int, help=argparse.SUPPRESS)
    made.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.role is not None:
        line = socket.socket(fileno=options.socket)
        if options.role == "lender":
            Lender(line, options.devices[0]).run()
            return
        try:
            found = Reader(line, options.devices[0]).run(is_whole=options.whole)
        except (BackendError, OSError, ValueError) as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found))
        return
    machine = describe_gpu() | {"num_gpus": torch.cuda.device_count()}
    results: dict[str, Any] = {"machine": machine, "num_bytes": NUM_BYTES}
    if len(set(options.devices)) > 1:
        one, other = options.devices
        results["peer_access"] = torch.cuda.can_device_access_peer(other, one)
    for sight, is_apart in (("both", False), ("apart", True)):
        results[sight] = measure(options.devices, is_apart=is_apart)
        if options.json:
            write(options.json, results)
    print(table(results))


if __name__ == "__main__":
    main()
