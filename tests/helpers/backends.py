"""Layers over a backend: one counts calls, one fails chosen ones, one has only so much memory."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from kvcached_core.errors import OutOfMemoryError
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.vmm.backend import Backend, Fence, Handle, Mark

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")


class Layer:
    """A backend that passes every call on to another one, through a single place.

    Subclasses override `_call` to see all calls, or single verbs to change them.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    def _call(
        self, _verb: str, _num_bytes: int, function: Callable[..., Result], *args: object
    ) -> Result:
        return function(*args)

    @property
    def granularity_bytes(self) -> int:
        return self.inner.granularity_bytes

    def reserve(self, num_bytes: int) -> int:
        return self._call("reserve", num_bytes, self.inner.reserve, num_bytes)

    def free(self, address: int, num_bytes: int) -> None:
        self._call("free", num_bytes, self.inner.free, address, num_bytes)

    def create(self, num_bytes: int) -> Handle:
        return self._call("create", num_bytes, self.inner.create, num_bytes)

    def release(self, handle: Handle) -> None:
        self._call("release", handle.num_bytes, self.inner.release, handle)

    def map(self, address: int, handle: Handle) -> None:
        self._call("map", handle.num_bytes, self.inner.map, address, handle)

    def unmap(self, address: int, handle: Handle) -> None:
        self._call("unmap", handle.num_bytes, self.inner.unmap, address, handle)

    def zero(self, address: int, num_bytes: int) -> None:
        self._call("zero", num_bytes, self.inner.zero, address, num_bytes)

    def join(self, stream: int) -> None:
        self._call("join", 0, self.inner.join, stream)

    def synchronize(self) -> None:
        self._call("synchronize", 0, self.inner.synchronize)

    def fence(self, stream: int) -> Fence:
        return self._call("fence", 0, self.inner.fence, stream)

    def copy_in(self, address: int, host_address: int, num_bytes: int) -> None:
        self._call("copy_in", num_bytes, self.inner.copy_in, address, host_address, num_bytes)

    def copy_out(self, host_address: int, address: int, num_bytes: int) -> None:
        self._call("copy_out", num_bytes, self.inner.copy_out, host_address, address, num_bytes)

    def join_copies(self, stream: int) -> None:
        self._call("join_copies", 0, self.inner.join_copies, stream)

    def mark_copies(self) -> Mark:
        return self._call("mark_copies", 0, self.inner.mark_copies)

    def finish_copies(self) -> None:
        self._call("finish_copies", 0, self.inner.finish_copies)

    def register(self, host_address: int, num_bytes: int) -> None:
        self._call("register", num_bytes, self.inner.register, host_address, num_bytes)

    def unregister(self, host_address: int) -> None:
        self._call("unregister", 0, self.inner.unregister, host_address)

    def tensor(self, address: int, num_bytes: int) -> "torch.Tensor":
        return self._call("tensor", num_bytes, self.inner.tensor, address, num_bytes)


class CountingBackend(Layer):
    """Counts the calls of each thread, and what is created and not released.

    Args:
        inner: The backend below.
        created_bytes: What has been created before.
    """

    def __init__(self, inner: Backend, created_bytes: int = 0) -> None:
        super().__init__(inner)
        self.created_bytes = created_bytes
        self._threads: Counter[int] = Counter()
        self._lock = threading.Lock()

    def num_calls_of_thread(self, identifier: int) -> int:
        """Return the calls of the thread with this `threading.get_ident`, failures included."""
        return self._threads[identifier]

    def _call(
        self, verb: str, num_bytes: int, function: Callable[..., Result], *args: object
    ) -> Result:
        with self._lock:
            self._threads[threading.get_ident()] += 1
        result = function(*args)
        with self._lock:
            self.created_bytes += {"create": num_bytes, "release": -num_bytes}.get(verb, 0)
        return result


class LimitedBackend(Layer):
    """Refuses to create more than `limit_bytes` at a time."""

    def __init__(self, inner: Backend, limit_bytes: int) -> None:
        super().__init__(inner)
        self.limit_bytes = limit_bytes
        self.created_bytes = 0

    def create(self, num_bytes: int) -> Handle:
        available_bytes = self.limit_bytes - self.created_bytes
        if num_bytes > available_bytes:
            raise OutOfMemoryError("create", "limit reached", num_bytes, available_bytes)
        handle = super().create(num_bytes)
        self.created_bytes += num_bytes
        return handle

    def release(self, handle: Handle) -> None:
        super().release(handle)
        self.created_bytes -= handle.num_bytes


class FaultyBackend(Layer):
    """Fails the calls that `fails` chooses, before they reach the backend below.

    Args:
        inner: The backend below.
        fails: Called with the verb and its running number, from 0; True makes that call fail.
    """

    def __init__(self, inner: Backend, fails: Callable[[str, int], bool]) -> None:
        super().__init__(inner)
        self.fails = fails
        self.num_calls: dict[str, int] = {}

    def _call(
        self, verb: str, num_bytes: int, function: Callable[..., Result], *args: object
    ) -> Result:
        number = self.num_calls.get(verb, 0)
        self.num_calls[verb] = number + 1
        if self.fails(verb, number):
            raise OutOfMemoryError(verb, f"injected at call {number}", num_bytes, 0)
        return function(*args)


def count_calls(memory: RankMemory) -> CountingBackend:
    """Put a layer that counts over the backend of a rank's memory, while nothing is done there."""
    counting = CountingBackend(memory.backend, memory.arena.resident_bytes)
    memory.backend = memory.arena.backend = counting
    return counting
