"""The row `disk` of `offload.py`: a long prompt comes back from disk, beside the disk's own speed.

The host tier in front has room for one such prompt, so two others push it out of there.
"""

import os
import statistics
import time
from pathlib import Path
from typing import Any

from parts.offload_servers import DISK, SETTLED_SECONDS, Bench, give_back

from kvcached_core.cli.disk_tiers import read_speed
from kvcached_core.units import MIB

TIMES_DISK, MORE_SECONDS = 1.5, 0.05  # the bar: so many times what the disk takes, and that
NUM_OTHERS = 2


def disk(bench: Bench, folder: Path) -> dict[str, Any]:
    """Compute a long prompt, have nothing of it but files, and ask again.

    Args:
        bench: The servers.
        folder: Where the tier on disk lies.
    """
    server, servers = bench[DISK], bench.setting.servers
    rounds: list[dict[str, Any]] = []
    for _ in range(max(2 * bench.sizes.rounds, 3)):
        prompt = bench.prompt(bench.sizes.long_tokens)
        computed = bench.ask(server, prompt)
        _settle(bench, folder)
        for _ in range(NUM_OTHERS):
            bench.ask(server, bench.prompt(bench.sizes.long_tokens))
            _settle(bench, folder)
        give_back(bench, DISK, servers.view(DISK).cached_bytes)
        drop_page_cache(folder)
        speed = read_speed(folder)
        drop_page_cache(folder)
        loaded = bench.copied(server, "load")[0]
        again = bench.ask(server, prompt)
        _settle(bench, folder)
        loaded = bench.copied(server, "load")[0] - loaded
        bar = loaded / speed * TIMES_DISK + MORE_SECONDS if speed else None
        rounds.append(
            {
                "computed_seconds": computed,
                "again_seconds": again,
                "loaded_bytes": loaded,
                "disk_bytes_per_second": speed,
                "bar_seconds": bar,
                "of_bar": again / bar if bar else None,
                "of_computed": again / computed,
            }
        )
        bench.record.add(disk={"rounds": rounds})
        print(f"disk: {rounds[-1]}", flush=True)
    of_bar = [one["of_bar"] for one in rounds if one["of_bar"] is not None]
    result = {
        "rounds": rounds,
        "of_bar": statistics.median(of_bar) if of_bar else None,
        "of_computed": statistics.median(one["of_computed"] for one in rounds),
        "file_mib": sum(path.stat().st_size for path in folder.rglob("*.bin")) / MIB,
    }
    print(f"disk: {result['of_bar']} of the bar, {result['of_computed']} of computing", flush=True)
    return result


def drop_page_cache(folder: Path) -> None:
    """Have all files of a folder on its disk alone."""
    for path in folder.rglob("*.bin"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _settle(bench: Bench, folder: Path) -> None:
    """Wait until all that was computed is stored, and on disk."""
    bench.settle(bench[DISK])
    was = -1
    while (now := len(list(folder.rglob("*")))) != was:
        was = now
        time.sleep(SETTLED_SECONDS)
