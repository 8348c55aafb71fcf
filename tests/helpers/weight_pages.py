"""Pages of weights without a device, and who copies them: what a host copy goes by."""

import ctypes
import zlib
from dataclasses import dataclass, field

from kvcached_core.errors import BackendError

PAGE_BYTES = 64 * 1024


@dataclass(frozen=True)
class PagedLayout:
    page_bytes: int = PAGE_BYTES
    num_pages: int = 4


@dataclass
class Pages:
    """The pages of an image as a copy sees them; `copied` has each page that was copied out."""

    content: list[bytes]
    copied: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, seed: int, num_pages: int = 4) -> "Pages":
        """Return pages that differ from each other and from those of another seed."""
        return cls([bytes([seed, page]) * (PAGE_BYTES // 2) for page in range(num_pages)])

    def sums(self, first: int, num_pages: int) -> list[tuple[int, int]]:
        found = self.content[first : first + num_pages]
        return [(zlib.crc32(page), zlib.adler32(page)) for page in found]

    def copy_out(self, page: int, host_address: int) -> None:
        ctypes.memmove(host_address, self.content[page], PAGE_BYTES)
        self.copied.append(page)


class Pins:
    """What is page-locked; no more than `num_allowed` ranges can be."""

    def __init__(self, num_allowed: int = 1000) -> None:
        self.ranges: dict[int, int] = {}
        self._num_allowed = num_allowed

    def register(self, host_address: int, num_bytes: int) -> None:
        overlap = any(
            start < host_address + num_bytes and host_address < start + size
            for start, size in self.ranges.items()
        )
        if overlap or len(self.ranges) == self._num_allowed:
            raise BackendError("register", "CUDA_ERROR_OUT_OF_MEMORY", num_bytes)
        self.ranges[host_address] = num_bytes

    def unregister(self, host_address: int) -> None:
        del self.ranges[host_address]

    def finish_copies(self) -> None:
        pass


def bytes_at(address: int) -> bytes:
    """Return the page at an address."""
    return ctypes.string_at(address, PAGE_BYTES)
