"""What the kernel says is resident, not what we say."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcached_demo.harness.server import EngineServer

_RANGE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")
_ADDRESSES = re.compile(r"process (\d+) has addresses (0x[0-9a-f]+) to (0x[0-9a-f]+)")


def resident_bytes(address: int, num_bytes: int, pid: int | str = "self") -> int:
    """Return the resident bytes of the mappings that overlap a range, from /proc."""
    total, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if found := _RANGE.match(line):
            start, end = int(found[1], 16), int(found[2], 16)
            inside = start < address + num_bytes and address < end
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def resident_of_ranks(server: "EngineServer") -> list[int]:
    """Return what the kernel says of the KV ranges of each process that the log names, in turn."""
    found: dict[str, int] = {}
    for pid, start, end in _ADDRESSES.findall(server.log.read_text()):
        num_bytes = resident_bytes(int(start, 16), int(end, 16) - int(start, 16), pid)
        found[pid] = found.get(pid, 0) + num_bytes
    return list(found.values())


def resident_by_proc(server: "EngineServer") -> int:
    """Return what the kernel says of the server's KV range, wherever its worker runs."""
    return resident_of_ranks(server)[-1]
