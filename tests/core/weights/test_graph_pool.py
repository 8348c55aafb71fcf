"""The memory of CUDA graphs: what torch allocates there is kept, and what it has freed goes."""

import ctypes
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.backends import LimitedBackend

from kvcached_core.memory.vmm.backend import Backend
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import KIB
from kvcached_core.weights.annex import Annex
from kvcached_core.weights.graph_pool import ALLOCATE, GraphPool

UNIT = 64 * KIB
FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)


class Torch:
    """torch's allocator as far as it has to do with a pool: it calls by addresses."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._bytes: Any = None
        self.annex = Annex(backend, self._room)
        self.pool = GraphPool(self.annex, lambda: self.segments)
        self.segments: list[dict[str, Any]] = []

    def allocate(self, num_bytes: int, *blocks: tuple[int, str]) -> int | None:
        """Have a segment of blocks of these sizes and states; return its address."""
        address: int | None = ALLOCATE(self.pool.allocate)(num_bytes, 0, None)
        if address is not None:
            found, at = list[dict[str, Any]](), address
            for size, state in blocks:
                found.append({"address": at, "size": size, "state": state})
                at += size
            self.segments.append({"address": address, "total_size": num_bytes, "blocks": found})
        return address

    def free(self, address: int) -> None:
        (segment,) = [one for one in self.segments if one["address"] == address]
        FREE(self.pool.free)(address, segment["total_size"], 0, None)
        self.segments.remove(segment)

    def words(self, address: int, num_units: int) -> torch.Tensor:
        return self.backend.tensor(address, num_units * UNIT).view(torch.int64)

    def _room(self, num_bytes: int) -> int:
        self._bytes = (ctypes.c_int8 * num_bytes)()
        return ctypes.addressof(self._bytes)


@pytest.fixture
def allocator() -> Iterator[Torch]:
    made = Torch(HostBackend(UNIT))
    yield made
    made.annex.close()


def test_what_is_allocated_is_kept_and_what_is_inactive_is_not(allocator: Torch) -> None:
    address = allocator.allocate(
        4 * UNIT, (UNIT, "inactive"), (UNIT, "active_allocated"), (2 * UNIT, "inactive")
    )
    assert address is not None
    words = allocator.words(address, 4)
    words.fill_(7)
    allocator.annex.drop()
    assert allocator.annex.resident_bytes == 0
    allocator.annex.bring()
    assert words.view(4, -1)[:, 0].tolist() == [0, 7, 0, 0]


@pytest.mark.parametrize("state", ["active_pending_free", "active_awaiting_free"])
def test_what_is_about_to_be_freed_is_kept(allocator: Torch, state: str) -> None:
    address = allocator.allocate(UNIT, (UNIT, state))
    assert address is not None
    words = allocator.words(address, 1)
    words.fill_(3)
    allocator.annex.drop()
    allocator.annex.bring()
    assert int(words[0]) == 3


def test_a_segment_is_found_among_those_of_other_pools(allocator: Torch) -> None:
    address = allocator.allocate(UNIT, (UNIT, "active_allocated"))
    assert address is not None
    blocks = [{"address": 4096, "size": 4096, "state": "active_allocated"}]
    allocator.segments.append({"address": 4096, "total_size": 4096, "blocks": blocks})
    allocator.words(address, 1).fill_(1)
    allocator.annex.drop()
    allocator.annex.bring()
    assert int(allocator.words(address, 1)[0]) == 1


def test_a_segment_that_torch_has_freed_is_given_back_when_the_annex_goes(
    allocator: Torch,
) -> None:
    first, second = (allocator.allocate(UNIT, (UNIT, "inactive")) for _ in range(2))
    assert first is not None
    allocator.free(first)
    assert allocator.pool.num_bytes == 2 * UNIT
    allocator.annex.drop()
    allocator.annex.bring()
    assert allocator.pool.num_bytes == allocator.annex.resident_bytes == UNIT
    assert list(allocator.annex.sizes(allocator.pool)) == [second]


def test_without_memory_torch_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    allocator = Torch(LimitedBackend(HostBackend(UNIT), UNIT))
    with caplog.at_level(logging.WARNING):
        assert allocator.allocate(2 * UNIT) is None
    assert "no memory for CUDA graphs" in caplog.text
    assert allocator.allocate(UNIT) is not None
    allocator.annex.close()
