"""Whether tiers on disk deliver a prompt's cache sooner than its engine computes it.

An engine does not weigh it: it reads what lies there. For small models, whose tokens are cheap to
compute and not much smaller, a disk is often too slow.
"""

import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from kvcached_core.cli.tiers import tiers
from kvcached_core.units import MIB, format_bytes
from kvcached_core.weights.host_tier import DiskTier

NUM_THREADS = 16  # as many as vLLM's tier reads with
MAX_FILES, MAX_BYTES, MIN_BYTES = 4096, 256 * MIB, 16 * MIB
MAX_FOLDERS = 65_536  # those whose files were removed stay: up to a million
ALIGNMENT = mmap.PAGESIZE


def examine_disks(directory: Path) -> Iterator[tuple[bool, str]]:
    """Yield for each tier on disk whether it is fast enough, and a text.

    Its own files are read for that, for about a second and not from the page cache.

    Args:
        directory: The folder of the ledgers.
    """
    for view in tiers(directory):
        for disk in view.disks:
            is_good, text = _judge(disk)
            yield is_good, f"the tier of {view.instance} in {disk.folder} {text}"


def _judge(disk: DiskTier) -> tuple[bool, str]:
    if not disk.computed_bytes_per_second:
        return True, "was not compared with its engine yet: that has computed no long prompt"
    read = read_speed(Path(disk.folder))
    if read is None:
        return True, f"has less than {format_bytes(MIN_BYTES)} that can be read here"
    computed = disk.computed_bytes_per_second
    speeds = f"reads {speed_text(read)}, and its engine computes {speed_text(computed)} of KV cache"
    if read >= computed:
        return True, speeds
    return False, (
        f"{speeds}: prompts from there come back later than they are computed; offload to host "
        "memory alone, or to a disk that reads more than that"
    )


def read_speed(folder: Path) -> float | None:
    """Return how many bytes a second are read of files in a folder, by as many threads as vLLM has.

    Returns:
        None if too little lies there, or nothing that can be read.
    """
    files = _files(folder)
    if sum(num_bytes for _, num_bytes in files) < MIN_BYTES:
        return None
    started = time.perf_counter()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        read = sum(pool.map(lambda file: _read(*file), files))
    return read / (time.perf_counter() - started) if read >= MIN_BYTES else None


def _files(folder: Path) -> list[tuple[Path, int]]:
    found: list[tuple[Path, int]] = []
    left = MAX_BYTES
    for path in islice(_paths(folder), MAX_FILES):
        try:
            num_bytes = path.stat().st_size if path.is_file() else 0
        except OSError:
            continue  # it was removed meanwhile, or is another user's
        if num_bytes >= ALIGNMENT:
            found.append((path, num_bytes))
            left -= num_bytes
        if left <= 0:
            break
    return found


def _paths(folder: Path) -> Iterator[Path]:
    """Yield what is no folder: one folder after the other, for a tier has thousands of them."""
    for root, _, names in islice(os.walk(folder), MAX_FOLDERS):
        yield from (Path(root, name) for name in names)


def _read(path: Path, num_bytes: int) -> int:
    """Read a file beside the page cache; return how many bytes came."""
    size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
    with mmap.mmap(-1, size) as room:
        for flags in (os.O_DIRECT, 0):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
            except OSError:
                continue  # a file system that knows no O_DIRECT, or a file that is gone
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                return os.readv(fd, [room])
            except OSError:
                continue
            finally:
                os.close(fd)
    return 0


def speed_text(bytes_per_second: float) -> str:
    """Return a speed as people are told it."""
    return f"{format_bytes(int(bytes_per_second))} a second"
