"""What a memory backend can do, in pairs: reserve / free, create / release, map / unmap."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")


class Handle(Protocol):
    """A piece of physical memory."""

    @property
    def num_bytes(self) -> int:
        """Its size in bytes."""


class Backend(Protocol):
    """Addresses and memory, and how the two are tied together.

    Every size and address is a multiple of `granularity_bytes`. A handle is mapped at one address
    at a time and is unmapped whole. Reading or writing an address that is not mapped faults.
    """

    @property
    def granularity_bytes(self) -> int:
        """The smallest unit of create and map, in bytes."""

    def reserve(self, num_bytes: int) -> int:
        """Return the address of a new range of `num_bytes` addresses without memory."""

    def free(self, address: int, num_bytes: int) -> None:
        """Give back a range from `reserve`; nothing in it may be mapped any more."""

    def create(self, num_bytes: int) -> Handle:
        """Return `num_bytes` of physical memory.

        Raises:
            OutOfMemoryError: If there is not enough.
        """

    def release(self, handle: Handle) -> None:
        """Give back memory from `create`; it must not be mapped any more."""

    def map(self, address: int, handle: Handle) -> None:
        """Put `handle` under `address` and make it readable and writable; it reads as zeros."""

    def unmap(self, address: int, handle: Handle) -> None:
        """Take `handle` away from `address`; its content is lost."""

    def tensor(self, address: int, num_bytes: int) -> "torch.Tensor":
        """Return an int8 tensor over the range, mapped or not, without touching it."""


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
        """The inner backend's granularity, in bytes."""
        return self.inner.granularity_bytes

    def reserve(self, num_bytes: int) -> int:
        """See `Backend.reserve`."""
        return self._call("reserve", num_bytes, self.inner.reserve, num_bytes)

    def free(self, address: int, num_bytes: int) -> None:
        """See `Backend.free`."""
        self._call("free", num_bytes, self.inner.free, address, num_bytes)

    def create(self, num_bytes: int) -> Handle:
        """See `Backend.create`."""
        return self._call("create", num_bytes, self.inner.create, num_bytes)

    def release(self, handle: Handle) -> None:
        """See `Backend.release`."""
        self._call("release", handle.num_bytes, self.inner.release, handle)

    def map(self, address: int, handle: Handle) -> None:
        """See `Backend.map`."""
        self._call("map", handle.num_bytes, self.inner.map, address, handle)

    def unmap(self, address: int, handle: Handle) -> None:
        """See `Backend.unmap`."""
        self._call("unmap", handle.num_bytes, self.inner.unmap, address, handle)

    def tensor(self, address: int, num_bytes: int) -> "torch.Tensor":
        """See `Backend.tensor`."""
        return self._call("tensor", num_bytes, self.inner.tensor, address, num_bytes)
