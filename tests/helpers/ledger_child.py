"""Run as a script: one instance on the host backend that does what its standard input says.

Arguments: the ledger, the capacity in bytes, the instance's name. A line is a JSON list of an
operation and its number of pages; the answer is a line, too.
"""

import json
import random
import sys
from pathlib import Path

from kvcached_core.ledger.ledger import Ledger
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.vmm.host import HostBackend

PAGE = 2 * 1024 * 1024
NUM_PAGES = 64
GEOMETRY = Geometry(block_bytes=128 * 1024, num_planes=4, ids_per_page=16, blocks_per_page=4)
WITH_WEIGHTS = ("wake", "restore", "drop", "give_up")
OPERATIONS = ("promise", "borrow", "map", "cancel", "free", "use", "answer", *WITH_WEIGHTS)


class Child:
    """An instance whose pages are mapped for real."""

    def __init__(self, path: Path, capacity_bytes: int, name: str) -> None:
        self.ledger = Ledger(path, capacity_bytes)
        self.row = self.ledger.register(name=name, engine="test", page_bytes=PAGE)
        self.arena = Arena(HostBackend(), GEOMETRY, NUM_PAGES)
        self.num_promised = self.num_used = self.num_cached = 0
        self.num_weights = self.num_announced = 0

    def promise(self, num: int) -> int:
        granted = self.ledger.promise(self.row, num * PAGE, PAGE) // PAGE
        self.num_promised += granted
        return granted

    def borrow(self, num: int) -> int:
        """Reserve for a request that waits: what is missing to others' floors, too."""
        granted = self.ledger.promise(self.row, num * PAGE, PAGE, is_waiting=True) // PAGE
        self.num_promised += granted
        return granted

    def map(self, num: int) -> int:
        num = min(num, self.num_promised)
        pages = [page for page in range(NUM_PAGES) if not self.arena.is_resident(page)][:num]
        self.arena.map(pages)
        self.num_promised -= len(pages)
        self._settle(mapped_bytes=len(pages) * PAGE)
        return len(pages)

    def cancel(self, num: int) -> int:
        num = min(num, self.num_promised)
        self.ledger.cancel(self.row, num * PAGE)
        self.num_promised -= num
        return num

    def free(self, num: int) -> int:
        pages = self.arena.resident_pages[:num]
        self.arena.unmap(pages)
        self._settle(unmapped_bytes=len(pages) * PAGE)
        return len(pages)

    def use(self, num: int) -> int:
        num_resident = len(self.arena.resident_pages)
        self.num_used = min(num, num_resident)
        self.num_cached = (num_resident - self.num_used) // 2
        self._settle()
        return self.num_used

    def answer(self, _num: int) -> int:
        wanted = self.ledger.wanted(self.row)
        self.ledger.acknowledge(self.row)
        return self.free(wanted.asked_bytes // PAGE)

    def wake(self, num: int) -> int:
        """Announce so many pages of weights, unless some are announced already."""
        if self.num_announced:
            return 0
        self.ledger.describe_weights(self.row, (self.num_weights + num) * PAGE)
        self.ledger.announce(self.row, num * PAGE, is_waking=True)
        self.num_announced = num
        return num

    def restore(self, num: int) -> int:
        """Map weights that were announced, if it is this one's turn and there is room for all."""
        has_room = self.ledger.free_bytes(self.row) >= self.num_announced * PAGE
        if not self.ledger.is_first_waker(self.row) or not has_room:
            return 0
        num = min(num, self.num_announced)
        self.ledger.settle_weights(self.row, mapped_bytes=num * PAGE)
        self.num_announced -= num
        self.num_weights += num
        return num

    def drop(self, num: int) -> int:
        """Unmap weights, unless it wakes."""
        num = 0 if self.num_announced else min(num, self.num_weights)
        self.ledger.settle_weights(self.row, unmapped_bytes=num * PAGE)
        self.num_weights -= num
        return num

    def give_up(self, _num: int) -> int:
        """Wake no more."""
        given_up, self.num_announced = self.num_announced, 0
        self.ledger.announce(self.row, 0)
        return given_up

    def see(self, _num: int) -> list[list[object]]:
        """Return name, process and resident pages of every instance that it sees."""
        return [
            [row.name, row.pid, row.resident_bytes // PAGE] for row in self.ledger.view().instances
        ]

    def storm(self, num: int) -> None:
        """Do `num` operations of its own choice."""
        source = random.Random(num + self.row.number)
        for _ in range(num):
            getattr(self, source.choice(OPERATIONS))(source.randrange(1, 12))

    def _settle(self, mapped_bytes: int = 0, unmapped_bytes: int = 0) -> None:
        num_resident = len(self.arena.resident_pages)
        self.num_used = min(self.num_used, num_resident)
        self.num_cached = min(self.num_cached, num_resident - self.num_used)
        self.ledger.settle(
            self.row,
            mapped_bytes=mapped_bytes,
            unmapped_bytes=unmapped_bytes,
            used_bytes=self.num_used * PAGE,
            cached_bytes=self.num_cached * PAGE,
        )


def main() -> None:
    """Carry out lines until the input ends."""
    child = Child(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    print(json.dumps(child.row), flush=True)
    for line in sys.stdin:
        operation, num = json.loads(line)
        print(json.dumps(getattr(child, operation)(num)), flush=True)


if __name__ == "__main__":
    main()
