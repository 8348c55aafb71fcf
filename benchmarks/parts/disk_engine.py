"""An engine of `disk_images`: pages of random bytes, their copy, and a process that is asked."""

import ctypes
import json
import random
import sys
import time
from dataclasses import dataclass
from threading import Event
from zlib import crc32

from kvcached_core.config import Config
from kvcached_core.units import MIB
from kvcached_core.weights.budgets import make_budget
from kvcached_core.weights.host_copy import HostCopy
from kvcached_core.weights.key import CopyKey
from kvcached_core.weights.moving_out import MovingOut
from kvcached_core.weights.open_copy import open_copy

PAGE_BYTES = 64 * MIB
WAIT_SECONDS, AGAIN_SECONDS = 120.0, 0.05


class Pages:
    """Pages of random bytes, as a device would have them."""

    page_bytes = PAGE_BYTES

    def __init__(self, number: int, num_bytes: int) -> None:
        self.num_pages = num_bytes // PAGE_BYTES
        self._number = number

    def content(self, page: int) -> bytes:
        """Return the bytes of a page."""
        seed = random.Random(f"{self._number} {page}")
        return seed.randbytes(MIB) * (PAGE_BYTES // MIB)

    def sums(self, first: int, num_pages: int) -> list[tuple[int, int]]:
        """Return two sums of each page of a run."""
        contents = map(self.content, range(first, first + num_pages))
        return [(crc32(content), len(content)) for content in contents]

    def copy_out(self, page: int, host_address: int) -> None:
        """Copy a page to host memory."""
        ctypes.memmove(host_address, self.content(page), PAGE_BYTES)


class Unpinned:
    """Page-locks nothing: there is no device."""

    def register(self, host_address: int, num_bytes: int) -> None:
        """Do nothing."""

    def unregister(self, host_address: int) -> None:
        """Do nothing."""

    def finish_copies(self) -> None:
        """Do nothing."""


@dataclass
class Engine:
    """One model's copy, complete."""

    number: int
    pages: Pages
    config: Config
    copy: HostCopy | None = None

    def open(self, stop: Event) -> HostCopy | None:
        """Return the copy; None if host memory has no room."""
        key = CopyKey(f"{self.number:032x}", f"model-{self.number}")
        return open_copy(self.config, key, self.pages, make_budget(self.config), stop=stop)

    def start(self) -> None:
        """Have a copy, filled if there was none."""
        deadline = time.monotonic() + WAIT_SECONDS
        while (copy := self.open(Event())) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"model-{self.number} found no room")
            time.sleep(AGAIN_SECONDS)
        if not copy.is_complete:
            copy.fill(self.pages, Event())
        self.copy = copy

    def is_right(self) -> bool:
        """Return whether every page of the copy is what it was."""
        copy = self.copy
        return copy is not None and all(
            crc32((ctypes.c_char * PAGE_BYTES).from_address(copy.page_address(page))) == sums[0]
            for page, sums in enumerate(self.pages.sums(0, self.pages.num_pages))
        )


def run_engine(number: int, num_bytes: int, config: Config) -> None:
    """Be one engine: for each line of input have the copy back, and print what that took."""
    engine = Engine(number, Pages(number, num_bytes), config)
    engine.start()
    moving = MovingOut(engine, engine.open, Unpinned())
    moving.offer()
    print("ready", flush=True)
    for _ in sys.stdin:
        before = engine.copy
        begin, num_tries = time.monotonic(), 1
        while (copy := moving.back()) is None and time.monotonic() < begin + WAIT_SECONDS:
            num_tries += 1
            time.sleep(AGAIN_SECONDS)
        said = {
            "seconds": time.monotonic() - begin,
            "is_from_disk": copy is not before,
            "num_tries": num_tries,
            "is_there": copy is not None,
            "is_right": engine.is_right(),
        }
        moving.offer()
        print(json.dumps(said), flush=True)
    moving.close()
