"""Run as a script: allocates host memory until it has so much, says so, and waits.

    python allocating.py BYTES [CHILDREN]

With children each of them allocates as much; nothing but the bytes counts. A line on its input, or
its end, ends it; it ends with the exit code that the line says.
"""

import mmap
import os
import signal
import sys

from kvcached_core.program.processes import host_bytes

MADV_POPULATE_WRITE = 23
SLACK_BYTES = 1 << 19  # for what Python takes when it goes on


def allocate(num_bytes: int) -> list[mmap.mmap]:
    """Have so much but for some slack, what this process has already included."""
    held = list[mmap.mmap]()
    missing = num_bytes - SLACK_BYTES - host_bytes([os.getpid()])
    if missing > 0:
        held.append(mmap.mmap(-1, missing, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        held[0].madvise(MADV_POPULATE_WRITE)
    return held


def main() -> None:
    """Allocate, say so, wait."""
    num_bytes, num_children = int(sys.argv[1]), int(([*sys.argv, "0"])[2])
    for _ in range(num_children):
        if os.fork() == 0:
            os.setsid()
            held = allocate(num_bytes)
            signal.pause()
    held = allocate(num_bytes)
    print("all", flush=True)
    line = sys.stdin.readline()
    print(len(held), flush=True)
    sys.exit(int(line or 0))


if __name__ == "__main__":
    main()
