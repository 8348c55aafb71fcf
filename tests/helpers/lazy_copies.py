"""Host memory whose copies are never done before somebody waits for them: the slowest link."""

import ctypes
from collections import deque

from kvcached_core.errors import BackendError
from kvcached_core.memory.vmm.backend import Handle
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import KIB


class LazyHostBackend(HostBackend):
    """See the module. Its pages are small, so that a small model has several to a layer.

    Attributes:
        is_broken: Whether no stream can wait for a copy: the driver refuses it.
    """

    is_broken = False

    def __init__(self) -> None:
        super().__init__(64 * KIB)
        self._copies: deque[tuple[int, int, int]] = deque()
        self._num_done = 0

    @property
    def num_open(self) -> int:
        """Copies that are begun and not done."""
        return len(self._copies)

    def copy_in(self, address: int, host_address: int, num_bytes: int) -> None:
        self._mappings.check_copy(address, num_bytes)
        self._copies.append((address, host_address, num_bytes))

    def copy_out(self, host_address: int, address: int, num_bytes: int) -> None:
        self.finish_copies()
        super().copy_out(host_address, address, num_bytes)

    def unmap(self, address: int, handle: Handle) -> None:
        assert not any(address <= to < address + handle.num_bytes for to, *_ in self._copies)
        super().unmap(address, handle)

    def join_copies(self, stream: int) -> None:
        self.finish_copies()

    def finish_copies(self) -> None:
        self.carry_out(self._num_done + len(self._copies))

    def mark_copies(self) -> "LazyMark":  # type: ignore[override]  it stands in for a fence
        return LazyMark(self, self._num_done + len(self._copies))

    def carry_out(self, num_copies: int) -> None:
        """Do all up to the `num_copies`-th that was ever begun."""
        while self._num_done < num_copies:
            ctypes.memmove(*self._copies.popleft())
            self._num_done += 1


class LazyMark:
    """A point behind some copies; who joins it has them done."""

    def __init__(self, backend: LazyHostBackend, num_copies: int) -> None:
        self._backend = backend
        self._num_copies = num_copies

    def join(self, _stream: int) -> None:
        if LazyHostBackend.is_broken:
            raise BackendError("join", "planted", 0)
        self._backend.carry_out(self._num_copies)

    def is_done(self) -> bool:
        return self._backend._num_done >= self._num_copies

    def close(self) -> None:
        pass
