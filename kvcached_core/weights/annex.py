"""The annex: memory that an engine keeps beside weights and KV, gone while its weights are.

Buffers of its runner lie there, and pools of CUDA graphs. Addresses and content that is in use stay
as they are. What is not zero waits in host memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Protocol

from kvcached_core.errors import BackendError, PageStateError
from kvcached_core.memory.vmm.backend import Backend, Handle
from kvcached_core.weights.host_bytes import MAX_COPY_BYTES
from kvcached_core.weights.leeway import Leeway

if TYPE_CHECKING:
    import torch

Ranges = Sequence[tuple[int, int]]


class Tenant(Protocol):
    """Who has spans of the annex."""

    def in_use(self, spans: Mapping[int, int]) -> Mapping[int, Ranges]:
        """Return what has to be kept of its spans.

        Args:
            spans: The sizes of its spans in bytes, by their addresses.

        Returns:
            For each span that is still needed its ranges that hold something, as addresses and
            sizes. What lies between is zeros, or what it was, afterwards.
        """


@dataclass(eq=False)
class Span:
    """Addresses of the annex, and the memory under them while it is there.

    Attributes:
        address: Where it begins.
        num_bytes: Its size, a multiple of the granularity.
        tenant: Whose it is.
        handle: The memory; None while it is gone.
        kept: What of it is in host memory while it is gone: the first unit, the one behind the
            last, and how far behind the beginning it is there.
        words: What is in it, a row for each unit; None until somebody looks.
    """

    address: int
    num_bytes: int
    tenant: Tenant
    handle: Handle | None = None
    kept: list[tuple[int, int, int]] = field(default_factory=list)
    words: "torch.Tensor | None" = None


# A span, and the first of its units and the one behind the last.
Run = tuple[Span, int, int]


class Annex:
    """Spans of addresses that go and come together.

    One thread at a time uses it, between two steps.

    Attributes:
        is_there: Whether it may be used.
        num_bytes: Bytes of all spans, there or not. Any thread may read it.

    Args:
        backend: Where addresses and memory come from.
        room: Returns the address of so many bytes of host memory, always the same memory; what was
            in it may be lost when it has to grow. It may raise a `HostCopyError`.
    """

    def __init__(self, backend: Backend, room: Callable[[int], int]) -> None:
        self.backend = backend
        self.is_there = True
        self.num_bytes = 0
        self._leeway: Leeway | None = None
        self._room = room
        self._host_address = 0
        self._unit_bytes = backend.granularity_bytes
        self._spans: dict[int, Span] = {}

    @property
    def resident_bytes(self) -> int:
        """Bytes of memory that it has now."""
        return sum(span.num_bytes for span in self._spans.values() if span.handle is not None)

    def take(self, num_bytes: int, tenant: Tenant) -> int:
        """Return the address of a new span of at least so many bytes; whatever is in it.

        Raises:
            PageStateError: If the annex is not there.
            BackendError: If there is no memory for it.
        """
        if not self.is_there:
            raise PageStateError(f"take of {num_bytes} bytes of an annex that is not there")
        whole_bytes = -(-num_bytes // self._unit_bytes) * self._unit_bytes
        address = self.backend.reserve(whole_bytes)
        span = Span(address, whole_bytes, tenant)
        try:
            self._map(span)
        except BackendError:
            self.backend.free(address, whole_bytes)
            raise
        self._spans[address] = span
        self.num_bytes += whole_bytes
        return address

    def sizes(self, tenant: Tenant) -> dict[int, int]:
        """Return the sizes of a tenant's spans in bytes, by their addresses."""
        spans = self._spans.values()
        return {span.address: span.num_bytes for span in spans if span.tenant is tenant}

    def prepare(self) -> None:
        """Have the host memory that a drop needs now: a drop is quicker afterwards.

        Raises:
            HostCopyError: If the host has no room.
            OutOfMemoryError: If the device has not the little memory that looking at it takes.
        """
        self._room(_num_units(self._find_kept()) * self._unit_bytes)

    def drop(self) -> None:
        """Give all memory; what is in use is kept. Nothing on the device uses a span any more.

        Raises:
            HostCopyError: If the host has no room for what is to be kept; nothing was given then.
            OutOfMemoryError: If the device has no room to look at it; nothing was given then.
            BackendError: If the backend fails. The memory of some spans may still be there, and
                goes with the next call.
        """
        if self.is_there:
            self._keep()
            self.is_there = False
        for span in self._spans.values():
            self._unmap(span)

    def bring(self) -> None:
        """Have all memory again and begin to fill it; all of it, or nothing.

        What comes after the `join` and `join_copies` of the backend finds it full.

        Raises:
            BackendError: If there is no memory.
        """
        if self.is_there:
            return
        done: list[Span] = []
        try:
            for span in self._spans.values():
                if span.handle is None:
                    self._map(span)
                    done.append(span)
        except BackendError:
            for span in done:
                self._unmap(span)
            raise
        for span in self._spans.values():
            self._fill(span)
        self.is_there = True

    def close(self) -> None:
        """Give all memory and the addresses back. No tensor over them may be used any more."""
        for span in tuple(self._spans.values()):
            self._remove(span)

    def _keep(self) -> None:
        found, unit = self._find_kept(), self._unit_bytes
        self._host_address = self._room(_num_units(found) * unit)
        for span in self._spans.values():
            span.kept.clear()
        offset = 0
        for span, first, last in found:
            span.kept.append((first, last, offset))
            for address, host_address, size in self._pieces(span, first, last, offset):
                self.backend.copy_out(host_address, address, size)
            offset += (last - first) * unit
        self.backend.finish_copies()

    def _fill(self, span: Span) -> None:
        end = 0
        for first, last, offset in span.kept:
            self._zero(span, end, first)
            for address, host_address, size in self._pieces(span, first, last, offset):
                self.backend.copy_in(address, host_address, size)
            end = last
        self._zero(span, end, span.num_bytes // self._unit_bytes)

    def _pieces(
        self, span: Span, first: int, last: int, offset: int
    ) -> Iterator[tuple[int, int, int]]:
        """Yield the address, the host address and the size of what is copied at a time.

        It is cut where the host memory may be: a copy must not lie in two registrations.
        """
        address = span.address + first * self._unit_bytes - offset
        end = offset + (last - first) * self._unit_bytes
        while offset < end:
            stop = min(end, (offset // MAX_COPY_BYTES + 1) * MAX_COPY_BYTES)
            yield address + offset, self._host_address + offset, stop - offset
            offset = stop

    def _zero(self, span: Span, first: int, last: int) -> None:
        unit = self._unit_bytes
        if last > first:
            self.backend.zero(span.address + first * unit, (last - first) * unit)

    def _find_kept(self) -> list[Run]:
        """Return the units in use and not zero, in order; wait for torch's current stream."""
        runs = list(self._find_used())
        if not runs:
            return []
        if self._leeway is None:
            self._leeway = Leeway(self._units(runs[0]).device)
        looks = self._leeway.use(lambda: [self._units(run).any(dim=1) for run in runs])
        flags = chain.from_iterable(look.tolist() for look in looks)
        kept = list[Run]()
        for span, first, last in runs:
            for unit in range(first, last):
                if next(flags):
                    if kept and kept[-1][0] is span and kept[-1][2] == unit:
                        first_kept = kept.pop()[1]
                    else:
                        first_kept = unit
                    kept.append((span, first_kept, unit + 1))
        return kept

    def _find_used(self) -> Iterator[Run]:
        """Yield the units that are in use, as runs in order; forget spans that are not."""
        for tenant in {id(one.tenant): one.tenant for one in self._spans.values()}.values():
            sizes = self.sizes(tenant)
            used = tenant.in_use(sizes)
            for address in sizes:
                span = self._spans[address]
                if address not in used:
                    self._remove(span)
                    continue
                for first, last in self._runs(span, used[address]):
                    yield span, first, last

    def _runs(self, span: Span, ranges: Ranges) -> list[tuple[int, int]]:
        """Return the units that some ranges lie in, as runs."""
        unit, runs = self._unit_bytes, list[tuple[int, int]]()
        for address, num_bytes in sorted(ranges):
            begin = address - span.address
            if begin < 0 or begin + num_bytes > span.num_bytes:
                raise PageStateError(
                    f"{num_bytes} bytes at {address:#x} are in use; allowed are the "
                    f"{span.num_bytes} at {span.address:#x}"
                )
            first, last = begin // unit, -(-(begin + num_bytes) // unit)
            if runs and first <= runs[-1][1]:
                runs[-1] = (runs[-1][0], max(last, runs[-1][1]))
            elif last > first:
                runs.append((first, last))
        return runs

    def _units(self, run: Run) -> "torch.Tensor":
        span, first, last = run
        if span.words is None:
            import torch  # noqa: PLC0415  the core needs torch nowhere else

            whole = self.backend.tensor(span.address, span.num_bytes)
            span.words = whole.view(torch.int64).view(span.num_bytes // self._unit_bytes, -1)
        return span.words[first:last]

    def _map(self, span: Span) -> None:
        handle = self.backend.create(span.num_bytes)
        try:
            self.backend.map(span.address, handle)
        except BackendError:
            self.backend.release(handle)
            raise
        span.handle = handle

    def _unmap(self, span: Span) -> None:
        handle = span.handle
        if handle is not None:
            self.backend.unmap(span.address, handle)
            span.handle = None
            self.backend.release(handle)

    def _remove(self, span: Span) -> None:
        self._unmap(span)
        span.words = None
        self.backend.free(span.address, span.num_bytes)
        del self._spans[span.address]
        self.num_bytes -= span.num_bytes


def _num_units(runs: Sequence[Run]) -> int:
    return sum(last - first for _, first, last in runs)
