"""What `kvcached top` saw before: for rates and small curves."""

from collections import deque
from math import ceil

from kvcached_core.ledger.view import DeviceView, InstanceView

CURVE, ASCII_CURVE = " ▁▂▃▄▅▆▇█", " ._-=+*#@"
CURVE_WIDTH = 16


class History:
    """The last samples of every instance."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, str], deque[tuple[float, InstanceView]]] = {}

    def add(self, devices: list[DeviceView], seconds: float) -> None:
        """Remember a sample that was taken at `seconds`."""
        seen = {(view.device, row.name): row for view in devices for row in view.instances}
        self._samples = {key: self._samples.get(key, deque(maxlen=CURVE_WIDTH)) for key in seen}
        for key, row in seen.items():
            self._samples[key].append((seconds, row))

    def rate(self, device: str, name: str) -> tuple[float, float] | None:
        """Return the bytes mapped and unmapped in a second, or None after one sample."""
        samples = list(self._samples.get((device, name), ()))
        if len(samples) < 2:  # noqa: PLR2004  a rate needs two
            return None
        (start, first), (end, last) = samples[-2], samples[-1]
        passed = max(end - start, 1e-9)
        mapped = last.num_mapped_bytes - first.num_mapped_bytes
        return mapped / passed, (last.num_unmapped_bytes - first.num_unmapped_bytes) / passed

    def curve(self, device: str, name: str, capacity_bytes: int, *, is_ascii: bool = False) -> str:
        """Return the resident bytes so far as a line of blocks."""
        samples = self._samples.get((device, name), ())
        signs = ASCII_CURVE if is_ascii else CURVE
        highest = len(signs) - 1
        return "".join(
            signs[min(ceil(highest * row.resident_bytes / max(capacity_bytes, 1)), highest)]
            for _, row in samples
        )
