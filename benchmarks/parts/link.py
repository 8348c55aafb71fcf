"""How fast page-locked host memory is copied to devices: the bound of every wake from it."""

import time
from collections.abc import Sequence

from kvcached_core.units import GIB

COPY_BYTES = GIB  # beside two servers there is not room for more


def copy_seconds(num_bytes: int = 4 * GIB, devices: Sequence[int] = (0,), num: int = 5) -> float:
    """Return the median time in which each of some devices has so many bytes, all at once.

    It takes `COPY_BYTES` of the host and of the device for each, and copies them again and again.
    torch keeps nothing of that afterwards.
    """
    import torch

    pairs = []
    for device in devices:
        host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        pairs.append((host, torch.empty(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{device}")))
    seconds = []
    for _ in range(num):
        for device in devices:
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(-(-num_bytes // COPY_BYTES)):
            for host, there in pairs:
                there.copy_(host, non_blocking=True)
        for device in devices:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    pairs.clear()
    torch.cuda.empty_cache()
    whole_bytes = -(-num_bytes // COPY_BYTES) * COPY_BYTES
    return sorted(seconds)[num // 2] * num_bytes / whole_bytes


def gigabytes_per_second(devices: Sequence[int] = (0,)) -> float:
    """Return how fast each of some devices has bytes that are copied to all of them at once."""
    return 4 * GIB / 1e9 / copy_seconds(4 * GIB, devices)
