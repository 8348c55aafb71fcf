"""What a memory backend can do, in pairs: reserve / free, create / release, map / unmap.

Beside that it copies, in and out, between mapped memory and the host's.
"""

from typing import TYPE_CHECKING, Protocol

from kvcached_core.errors import PageStateError

if TYPE_CHECKING:
    import torch


class Handle(Protocol):
    """A piece of physical memory."""

    @property
    def num_bytes(self) -> int:
        """Its size in bytes."""


class Fence(Protocol):
    """A point behind the work that a stream had been given when the fence was made."""

    def wait(self) -> None:
        """Return when all of that work is done."""


class Mark(Protocol):
    """A point behind copies that had begun when the mark was made."""

    def join(self, stream: int) -> None:
        """Make later work on `stream` wait for these copies. Any number of streams may."""

    def is_done(self) -> bool:
        """Return whether these copies are done, without waiting for them.

        Raises:
            BackendError: If one of them failed.
        """

    def close(self) -> None:
        """Forget the mark; streams that wait for it go on waiting."""


class Backend(Protocol):
    """Addresses and memory, and how the two are tied together.

    Every size and address is a multiple of `granularity_bytes`. A handle is mapped at one address
    at a time and is unmapped whole. Reading or writing an address that is not mapped faults. All of
    it may be called from any thread.

    A stream is the driver's number of one; work on the host has none, and 0 stands for it.
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
        """Put `handle` under `address` and make it readable and writable, whatever is in it."""

    def unmap(self, address: int, handle: Handle) -> None:
        """Take `handle` away from `address`; its content is lost."""

    def zero(self, address: int, num_bytes: int) -> None:
        """Begin to fill a mapped range with zeros; `join` or `synchronize` say when it is done."""

    def join(self, stream: int) -> None:
        """Make later work on `stream` wait for every `zero` that has begun."""

    def synchronize(self) -> None:
        """Return when all that `zero` began is done."""

    def fence(self, stream: int) -> Fence:
        """Return a fence behind what `stream` has been given so far."""

    def copy_in(self, address: int, host_address: int, num_bytes: int) -> None:
        """Begin to copy host bytes to a mapped range; copies are done in the order they begin.

        The host bytes must stay as they are until `finish_copies` returns.

        Raises:
            PageStateError: If a part of the range is not mapped; then nothing is copied.
            BackendError: If the copy cannot be begun.
        """

    def copy_out(self, host_address: int, address: int, num_bytes: int) -> None:
        """Begin to copy a mapped range to host bytes, which are there when `finish_copies` returns.

        It waits for no stream: who wrote into the range has to be done.

        Raises:
            PageStateError: If a part of the range is not mapped; then nothing is copied.
            BackendError: If the copy cannot be begun.
        """

    def join_copies(self, stream: int) -> None:
        """Make later work on `stream` wait for every copy that has begun."""

    def mark_copies(self) -> Mark:
        """Return a mark behind every copy that has begun, and in front of later ones."""

    def finish_copies(self) -> None:
        """Return when every copy that has begun is done; other threads run meanwhile."""

    def register(self, host_address: int, num_bytes: int) -> None:
        """Make host memory fast to copy from and to; it works without, only slower.

        A copy must lie in one registered range or in none.

        Raises:
            BackendError: If the range, or a part of it, cannot be registered or is already.
        """

    def unregister(self, host_address: int) -> None:
        """Take back the registration that begins at `host_address`; no copy may be under way."""

    def tensor(self, address: int, num_bytes: int) -> "torch.Tensor":
        """Return an int8 tensor over the range, mapped or not, without touching it."""


class SharingBackend(Backend, Protocol):
    """A backend whose memory other processes of the host may map, on the same device or another.

    What it creates is there as long as anybody has it: whoever exported it, a descriptor of it, or
    somebody who imported it.
    """

    def export_handle(self, handle: Handle) -> int:
        """Return a file descriptor of memory from `create`, which the caller closes.

        Raises:
            BackendError: If it cannot be exported.
        """

    def import_handle(self, fd: int, num_bytes: int) -> Handle:
        """Return the `num_bytes` of memory that another process has exported; `fd` stays open.

        It is mapped, unmapped and released like memory of one's own.

        Raises:
            BackendError: If this process cannot have it.
        """

    def copy_between(self, address: int, source_address: int, num_bytes: int) -> None:
        """Begin to copy one mapped range to another, in the order of all copies.

        Raises:
            PageStateError: If a part of a range is not mapped; then nothing is copied.
            BackendError: If the copy cannot be begun.
        """


class Mappings:
    """Which handle is mapped where; refuses what the contract forbids before anything is done."""

    def __init__(self) -> None:
        self._handles: dict[int, Handle] = {}
        self._addresses: dict[Handle, int] = {}

    def check_map(self, address: int, handle: Handle) -> None:
        """Refuse to map over a mapped address, or a handle that is mapped."""
        if address in self._handles or handle in self._addresses:
            raise PageStateError(
                f"map at {address:#x}: the address or the handle is mapped already"
            )

    def check_unmap(self, address: int, handle: Handle) -> None:
        """Refuse to unmap what is not there."""
        if self._handles.get(address) is not handle:
            raise PageStateError(f"unmap at {address:#x} of a handle that is not mapped there")

    def check_release(self, handle: Handle) -> None:
        """Refuse to release a handle that is mapped."""
        if handle in self._addresses:
            raise PageStateError("release of a handle that is still mapped")

    def check_free(self, address: int, num_bytes: int) -> None:
        """Refuse to free a range with mapped pages in it."""
        if any(address <= mapped < address + num_bytes for mapped in tuple(self._handles)):
            raise PageStateError(f"free of a range at {address:#x} that still has mapped pages")

    def check_copy(self, address: int, num_bytes: int) -> None:
        """Refuse to copy from or to a range of which a part is not mapped.

        A device would go as far as that part, and be of no use any more.
        """
        at, end = address, address + num_bytes
        while at < end:
            handle = self._handles.get(at)
            if handle is None:
                at, handle = self._around(at)
            at += handle.num_bytes

    def add(self, address: int, handle: Handle) -> None:
        """Record that `handle` is mapped at `address`."""
        self._handles[address] = handle
        self._addresses[handle] = address

    def remove(self, address: int, handle: Handle) -> None:
        """Record that it is not any more."""
        del self._handles[address], self._addresses[handle]

    def _around(self, address: int) -> tuple[int, Handle]:
        """Return the handle that is mapped around an address, and where it begins."""
        for start, handle in tuple(self._handles.items()):
            if start <= address < start + handle.num_bytes:
                return start, handle
        raise PageStateError(f"copy from or to {address:#x}, which is not mapped")
