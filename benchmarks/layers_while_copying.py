"""Layers that wait for their pages while these are copied: what the device does, by its own clock.

    python benchmarks/layers_while_copying.py --json results/gpu/layers_while_copying_h200.json

32 layers multiply matrices, as those of an 8B model do for a prompt of 8,000 tokens, and 15 GiB
come in 240 pages. In front of each layer its stream waits for the layer's pages, as with
`KVCACHED_WEIGHTS_WAIT=layers`. Events on both streams say when each layer began and ended, and when
its pages were there. It does so on torch's own stream and on another one, with few pages handed
over ahead and with all, with memory that is allocated in front of the first layer, and where nobody
waits; and it does each part alone. `--tiny` rehearses it on the host backend, whose times say
nothing.
"""

import contextlib
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from parts.record import begin_record, command_line

from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import MIB
from kvcached_core.weights.arriving import Arriving
from kvcached_core.weights.host_bytes import MAX_COPY_BYTES, HostBytes

if TYPE_CHECKING:
    from kvcached_core.memory.vmm.backend import Backend

NUM_LAYERS, NUM_PAGES, PAGE_BYTES = 32, 240, 64 * MIB
NUM_TOKENS, HIDDEN, WIDE, NUM_TIMES = 8000, 4096, 14336, 2
TINY_TOKENS, TINY_PAGE_BYTES = 8, 2 * MIB
WINDOW_PAGES = 4  # of host memory that copies come from, again and again


@dataclass(frozen=True)
class Way:
    """One way to do it.

    Attributes:
        name: What the record calls it.
        has_copies: Whether pages come.
        has_layers: Whether layers are computed.
        waits: Whether each waits for its pages.
        is_at_once: Whether all copies are handed over before the first layer.
        is_aside: Whether layers run on a stream of their own, and not on torch's.
        allocates: Whether what the layers write to is allocated anew.
    """

    name: str
    has_copies: bool = True
    has_layers: bool = True
    waits: bool = True
    is_at_once: bool = False
    is_aside: bool = False
    allocates: bool = False


WAYS = (
    Way("layers alone", has_copies=False),
    Way("copies alone", has_layers=False),
    Way("nobody waits", waits=False),
    Way("layers wait"),
    Way("layers wait, all handed over before", is_at_once=True),
    Way("layers wait, on a stream of their own", is_aside=True),
    Way("layers wait, memory allocated", allocates=True),
)


@dataclass
class Times:
    """When something was reached: marks, which become seconds since the first of all."""

    copied: list[Any] = field(default_factory=list)
    started: list[Any] = field(default_factory=list)
    ended: list[Any] = field(default_factory=list)

    def seconds(self, since: Callable[[Any], float]) -> dict[str, list[float]]:
        """Return them as seconds."""
        return {name: [since(mark) for mark in marks] for name, marks in vars(self).items()}


class Device:
    """A device: its memory, its matrices and its clock."""

    def __init__(self, *, tiny: bool) -> None:
        self.is_gpu = not tiny
        self.backend: Backend = HostBackend() if tiny else CudaBackend()
        self.page_bytes = TINY_PAGE_BYTES if tiny else PAGE_BYTES
        self._kind = {"device": "cpu" if tiny else "cuda", "dtype": torch.bfloat16}
        scale = 16 if tiny else 1
        hidden, wide = HIDDEN // scale, WIDE // scale
        tokens = TINY_TOKENS if tiny else NUM_TOKENS
        self._sizes = ((tokens, hidden), (tokens, wide))
        self._up = torch.randn(hidden, wide, **self._kind)
        self._down = torch.randn(wide, hidden, **self._kind)
        self._buffers = self._allocated()
        self._aside = None if tiny else torch.cuda.Stream()
        copies = getattr(self.backend, "_copies", None)
        self._copies = None if copies is None else torch.cuda.ExternalStream(int(copies))

    def compute(self) -> None:
        """Launch a layer."""
        narrow, wide = self._buffers
        for _ in range(NUM_TIMES):
            torch.mm(narrow, self._up, out=wide)
            torch.mm(wide, self._down, out=narrow)

    def allocate(self) -> None:
        """Give up what layers write to, also to the driver, and allocate it again."""
        self._buffers = ()
        if self.is_gpu:
            torch.cuda.empty_cache()
        self._buffers = self._allocated()

    def stream(self, *, is_aside: bool) -> contextlib.AbstractContextManager[Any]:
        """Return what makes the stream of the layers the current one."""
        return torch.cuda.stream(self._aside) if is_aside else contextlib.nullcontext()

    def current_stream(self) -> int:
        """Return the driver's number of the current stream."""
        return int(torch.cuda.current_stream().cuda_stream) if self.is_gpu else 0

    def mark(self, *, of_copies: bool = False) -> Any:
        """Return a mark behind what the stream of the layers, or of copies, has been given."""
        if not self.is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._copies if of_copies else torch.cuda.current_stream())
        return event

    def seconds_since(self, first: Any) -> Callable[[Any], float]:
        """Return what tells how long after the first mark another one was reached."""
        if not self.is_gpu:
            return lambda mark: float(mark - first)
        torch.cuda.synchronize()
        return lambda mark: float(first.elapsed_time(mark)) / 1e3

    def _allocated(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(size, **self._kind) for size in self._sizes)


class Walk:
    """Pages of a device, and layers that need them.

    Args:
        device: The device.
    """

    def __init__(self, device: Device) -> None:
        self._device, backend = device, device.backend
        self._page_bytes = page_bytes = device.page_bytes
        self._points = [(layer + 1) * NUM_PAGES // NUM_LAYERS for layer in range(NUM_LAYERS)]
        self._window_bytes = max(WINDOW_PAGES * page_bytes, MAX_COPY_BYTES)
        self._host = HostBytes(self._window_bytes, MAX_COPY_BYTES)
        self._host.touch(threading.Event())
        self._host.pin(backend, threading.Event())
        self._address = backend.reserve(NUM_PAGES * page_bytes)
        for page in range(NUM_PAGES):
            backend.map(self._address + page * page_bytes, backend.create(page_bytes))

    def do(self, way: Way) -> dict[str, list[float]]:
        """Do it once, and return when each layer's pages came, and when it began and ended."""
        device, times = self._device, Times()
        arriving = Arriving(device.backend, device.current_stream, self._page_bytes)

        def begin(page: int) -> None:
            self._copy(page)
            if page + 1 in self._points:
                times.copied.append(device.mark(of_copies=True))

        with device.stream(is_aside=way.is_aside):
            first = device.mark()
            for page in range(NUM_PAGES if way.has_copies else 0):
                arriving.expect(page, begin)
            if way.is_at_once:
                arriving.begin_rest()
            if way.allocates:
                device.allocate()
            for point in self._points if way.has_layers else ():
                arriving.wait(point if way.waits else 0)
                times.started.append(device.mark())
                device.compute()
                times.ended.append(device.mark())
            arriving.finish()
            device.backend.finish_copies()
            return times.seconds(device.seconds_since(first))

    def _copy(self, page: int) -> None:
        for offset in range(0, self._page_bytes, MAX_COPY_BYTES):
            num_bytes = min(MAX_COPY_BYTES, self._page_bytes - offset)
            place = (page * self._page_bytes + offset) % self._window_bytes
            address = self._address + page * self._page_bytes + offset
            self._device.backend.copy_in(address, self._host.address + place, num_bytes)


def table(results: dict[str, Any]) -> str:
    """Return the figures as text: medians, in milliseconds."""
    lines = []
    for name, rounds in results["ways"].items():
        ends = {
            what: 1e3 * statistics.median(one[what][-1] for one in rounds)
            for what in ("copied", "ended")
            if rounds[0][what]
        }
        words = [f"{what} {value:.1f}" for what, value in ends.items()]
        spans = [
            1e3 * (end - start)
            for one in rounds
            for start, end in zip(one["started"], one["ended"], strict=True)
        ]
        if spans:
            words.append(f"a layer {statistics.median(spans):.2f}, up to {max(spans):.2f}")
        lines.append(f"{name:40} {', '.join(words)}")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    arguments = command_line(__doc__, can_rehearse=True)
    arguments.add_argument("--number", type=int, default=5, help="how often, each way")
    options = arguments.parse_args()
    record = begin_record(options)
    record.add(num_layers=NUM_LAYERS, num_pages=NUM_PAGES)
    walk = Walk(Device(tiny=options.tiny))
    ways: dict[str, list[dict[str, list[float]]]] = {}
    for number in range(options.number + 1):
        for way in WAYS:
            times = walk.do(way)
            if number:  # the first time kernels are loaded
                ways.setdefault(way.name, []).append(times)
        record.add(ways=ways)
    print(table(record.results))


if __name__ == "__main__":
    main()
