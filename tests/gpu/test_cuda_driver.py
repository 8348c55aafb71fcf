"""The contract of every backend, kept by the real driver."""

import pytest
import torch
from helpers.contract import *  # noqa: F403  the tests that every backend passes
from helpers.contract import PAGE, Resident

from kvcached_core.errors import OutOfMemoryError
from kvcached_core.ledger.nvml import free_memory_reader
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.devices import cuda_device
from kvcached_core.memory.geometry import choose_geometry
from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.units import GIB, MIB

pytestmark = pytest.mark.gpu


@pytest.fixture
def backend() -> CudaBackend:
    return CudaBackend()


@pytest.fixture
def resident(backend: CudaBackend) -> Resident:
    # The first use of a torch kernel loads it, and torch keeps what it allocates: neither is ours.
    scratch = torch.zeros(PAGE, dtype=torch.int8, device="cuda").fill_(7)
    assert scratch.any()
    assert int(scratch.sum(dtype=torch.int64)) == 7 * PAGE
    torch.cuda.synchronize()
    before = backend.free_bytes + torch.cuda.memory_reserved()

    def resident_bytes(_address: int, _num_bytes: int) -> int:
        return before - backend.free_bytes - torch.cuda.memory_reserved()

    return resident_bytes


def test_the_device_runs_out_with_a_message_that_has_the_numbers(backend: CudaBackend) -> None:
    too_much = backend.total_bytes // backend.granularity_bytes * backend.granularity_bytes
    with pytest.raises(OutOfMemoryError) as caught:
        backend.create(too_much)
    assert caught.value.needed_bytes == too_much
    assert caught.value.available_bytes is not None
    assert caught.value.available_bytes < too_much


def test_nvml_and_the_driver_agree_on_what_is_free(backend: CudaBackend) -> None:
    properties = torch.cuda.get_device_properties(0)
    read = free_memory_reader(cuda_device(str(properties.uuid), properties.total_memory).name)
    assert abs(read() - backend.free_bytes) < GIB
    before = read()
    handle = backend.create(GIB)
    assert abs(before - read() - GIB) <= 64 * MIB
    backend.release(handle)


def test_blocks_at_both_ends_of_a_reservation_larger_than_the_device(backend: CudaBackend) -> None:
    geometry = choose_geometry(
        block_bytes=64 * 1024, num_planes=32, granularity_bytes=backend.granularity_bytes
    )
    num_pages = 400 * GIB // geometry.page_bytes
    arena = Arena(backend, geometry, num_pages)
    arena.map([0, num_pages - 1])
    backend.synchronize()
    last = geometry.block_id(num_pages * geometry.blocks_per_page - 1)
    for plane in range(geometry.num_planes):
        blocks = arena.plane_tensor(plane).view(-1, geometry.block_bytes)
        assert blocks.shape[0] == geometry.num_ids(num_pages)
        ids = torch.tensor([0, last], device="cuda")
        blocks[ids] = plane + 1
        assert int(blocks[ids].sum(dtype=torch.int64)) == 2 * geometry.block_bytes * (plane + 1)
    page = arena.tensor()[-geometry.page_bytes :]
    run = geometry.run_bytes
    for plane in range(geometry.num_planes):
        assert int(page[(plane + 1) * run - 1]) == plane + 1
    arena.close()


def test_a_tensor_made_by_torch_shares_the_context(backend: CudaBackend) -> None:
    address = backend.reserve(PAGE)
    handle = backend.create(PAGE)
    backend.map(address, handle)
    backend.join(int(torch.cuda.current_stream().cuda_stream))
    ours, theirs = backend.tensor(address, PAGE), torch.ones(PAGE, dtype=torch.int8, device="cuda")
    ours.copy_(theirs)
    assert int(ours.sum(dtype=torch.int64)) == PAGE
    torch.cuda.synchronize()
    backend.unmap(address, handle)
    backend.release(handle)
    backend.free(address, PAGE)
