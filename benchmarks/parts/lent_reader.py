"""The process that copies lent pages to the device beside."""

import json
import os
import signal
import socket
import statistics
import time
from typing import Any

import torch
from parts.lent_pages import BATCH_PAGES, MESSAGE_BYTES, NUM_BYTES, Clock, Pages
from parts.link import gigabytes_per_second

from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.units import MIB

PAGE_MIB = (64, 256)


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
