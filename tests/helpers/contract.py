"""What every backend keeps; a module that imports these tests has a `backend` fixture.

`resident` is a fixture too: a function that returns the bytes that are resident in a range.
"""

import mmap
from collections.abc import Callable, Iterator

import pytest
import torch

from kvcached_core.errors import BackendError, PageStateError
from kvcached_core.memory.vmm.backend import Backend
from kvcached_core.units import MIB

PAGE = 2 * MIB
Resident = Callable[[int, int], int]


def test_a_reservation_is_aligned_and_holds_no_memory(backend: Backend, resident: Resident) -> None:
    address = backend.reserve(1024 * PAGE)
    assert address % backend.granularity_bytes == 0
    assert resident(address, 1024 * PAGE) == 0
    backend.free(address, 1024 * PAGE)


def test_mapped_memory_is_zero_writable_and_resident(backend: Backend, resident: Resident) -> None:
    address = backend.reserve(8 * PAGE)
    handle = backend.create(PAGE)
    backend.map(address + 3 * PAGE, handle)
    backend.zero(address + 3 * PAGE, PAGE)
    backend.synchronize()
    tensor = backend.tensor(address, 8 * PAGE)
    run = tensor[3 * PAGE : 4 * PAGE]
    assert resident(address, 8 * PAGE) == PAGE
    assert not run.any()
    run.fill_(7)
    assert int(run.sum(dtype=torch.int64)) == 7 * PAGE
    backend.unmap(address + 3 * PAGE, handle)
    backend.release(handle)
    assert resident(address, 8 * PAGE) == 0
    backend.free(address, 8 * PAGE)


def test_memory_mapped_again_reads_as_zero(backend: Backend) -> None:
    address = backend.reserve(PAGE)
    for _ in range(2):
        handle = backend.create(PAGE)
        backend.map(address, handle)
        backend.zero(address, PAGE)
        backend.synchronize()
        assert not backend.tensor(address, PAGE).any()
        backend.tensor(address, PAGE).fill_(1)
        backend.unmap(address, handle)
        backend.release(handle)
    backend.free(address, PAGE)


@pytest.mark.parametrize("num_bytes", [0, -PAGE, PAGE + 4096])
def test_sizes_off_the_granularity_are_refused(backend: Backend, num_bytes: int) -> None:
    for call in (backend.reserve, backend.create):
        with pytest.raises(BackendError, match="not a multiple"):
            call(num_bytes)


def test_wrong_order_is_refused_and_changes_nothing(backend: Backend) -> None:
    address = backend.reserve(2 * PAGE)
    handle = backend.create(PAGE)
    with pytest.raises(PageStateError):
        backend.unmap(address, handle)
    backend.map(address, handle)
    with pytest.raises(PageStateError):
        backend.map(address + PAGE, handle)
    with pytest.raises(PageStateError):
        backend.release(handle)
    with pytest.raises(PageStateError):
        backend.free(address, 2 * PAGE)
    with pytest.raises(PageStateError):
        backend.unmap(address + PAGE, handle)
    backend.unmap(address, handle)
    backend.release(handle)
    backend.free(address, 2 * PAGE)


def test_a_stream_that_joins_sees_zeros_and_a_fence_waits_for_it(backend: Backend) -> None:
    address = backend.reserve(8 * PAGE)
    tensor = backend.tensor(address, 8 * PAGE)
    stream = 0
    for _ in range(20):
        handles = [backend.create(PAGE) for _ in range(8)]
        for index, handle in enumerate(handles):
            backend.map(address + index * PAGE, handle)
        backend.zero(address, 8 * PAGE)
        backend.join(stream)
        assert not tensor.any()
        tensor.fill_(1)
        backend.fence(stream).wait()
        for index, handle in enumerate(handles):
            backend.unmap(address + index * PAGE, handle)
            backend.release(handle)
    backend.free(address, 8 * PAGE)


def test_a_page_mapped_again_elsewhere_leaves_the_others_alone(backend: Backend) -> None:
    address = backend.reserve(4 * PAGE)
    tensor = backend.tensor(address, 4 * PAGE).view(4, -1)
    handles = [backend.create(PAGE) for _ in range(3)]
    for index, handle in enumerate(handles):
        backend.map(address + index * PAGE, handle)
    backend.synchronize()
    tensor[0].fill_(1)
    tensor[2].fill_(3)
    backend.fence(0).wait()
    backend.unmap(address + PAGE, handles[1])
    backend.map(address + 3 * PAGE, handles[1])
    backend.zero(address + 3 * PAGE, PAGE)
    backend.synchronize()
    assert int(tensor[0].min()) == 1
    assert int(tensor[2].min()) == 3
    assert not tensor[3].any()
    for index, handle in ((0, handles[0]), (3, handles[1]), (2, handles[2])):
        backend.unmap(address + index * PAGE, handle)
        backend.release(handle)
    backend.free(address, 4 * PAGE)


@pytest.fixture(params=[True, False], ids=["registered", "not registered"])
def host(request: pytest.FixtureRequest, backend: Backend) -> Iterator[torch.Tensor]:
    """Four pages of the host's memory, each with random bytes of its own."""
    memory = torch.frombuffer(mmap.mmap(-1, 4 * PAGE), dtype=torch.int8)
    memory.random_(-128, 128, generator=torch.Generator().manual_seed(0))
    if request.param:
        backend.register(memory.data_ptr(), 4 * PAGE)
    yield memory
    if request.param:
        backend.unregister(memory.data_ptr())


def test_what_was_copied_in_is_there_for_a_stream_that_joins(
    backend: Backend, host: torch.Tensor
) -> None:
    address = backend.reserve(4 * PAGE)
    handles = [backend.create(PAGE) for _ in range(4)]
    for _ in range(5):
        for index, handle in enumerate(handles):
            backend.map(address + index * PAGE, handle)
            backend.copy_in(address + index * PAGE, host.data_ptr() + index * PAGE, PAGE)
        backend.join_copies(0)
        found = backend.tensor(address, 4 * PAGE).to(host.device, copy=True)
        assert found.equal(host)
        for index, handle in enumerate(handles):
            backend.unmap(address + index * PAGE, handle)
    for handle in handles:
        backend.release(handle)
    backend.free(address, 4 * PAGE)


def test_who_joins_a_mark_finds_what_was_copied_in_front_of_it(
    backend: Backend, host: torch.Tensor
) -> None:
    address = backend.reserve(4 * PAGE)
    handles = [backend.create(PAGE) for _ in range(4)]
    marks = []
    for index, handle in enumerate(handles):
        backend.map(address + index * PAGE, handle)
        backend.copy_in(address + index * PAGE, host.data_ptr() + index * PAGE, PAGE)
        marks.append(backend.mark_copies())
    for index, mark in enumerate(marks):
        mark.join(0)
        found = backend.tensor(address, (index + 1) * PAGE).to(host.device, copy=True)
        assert found.equal(host[: (index + 1) * PAGE])
        assert mark.is_done()
        mark.close()
    for index, handle in enumerate(handles):
        backend.unmap(address + index * PAGE, handle)
        backend.release(handle)
    backend.free(address, 4 * PAGE)


def test_what_was_copied_out_is_there_when_copies_are_finished(
    backend: Backend, host: torch.Tensor
) -> None:
    address = backend.reserve(2 * PAGE)
    handles = [backend.create(PAGE) for _ in range(2)]
    for index, handle in enumerate(handles):
        backend.map(address + index * PAGE, handle)
    tensor = backend.tensor(address, 2 * PAGE)
    tensor[:PAGE].fill_(1)
    tensor[PAGE:].fill_(2)
    backend.fence(0).wait()
    before = host.clone()
    backend.copy_out(host.data_ptr() + PAGE, address, 2 * PAGE)
    backend.finish_copies()
    assert host[:PAGE].equal(before[:PAGE])
    assert host[3 * PAGE :].equal(before[3 * PAGE :])
    assert host[PAGE : 2 * PAGE].min() == host[PAGE : 2 * PAGE].max() == 1
    assert host[2 * PAGE : 3 * PAGE].min() == host[2 * PAGE : 3 * PAGE].max() == 2
    for index, handle in enumerate(handles):
        backend.unmap(address + index * PAGE, handle)
        backend.release(handle)
    backend.free(address, 2 * PAGE)


def test_copies_are_done_in_the_order_they_begin(backend: Backend, host: torch.Tensor) -> None:
    address = backend.reserve(PAGE)
    handle = backend.create(PAGE)
    backend.map(address, handle)
    first = host[:PAGE].clone()
    backend.copy_in(address, host.data_ptr(), PAGE)
    backend.copy_out(host.data_ptr() + PAGE, address, PAGE)
    backend.copy_in(address, host.data_ptr() + 2 * PAGE, PAGE)
    backend.finish_copies()
    assert host[PAGE : 2 * PAGE].equal(first)
    assert backend.tensor(address, PAGE).to(host.device).equal(host[2 * PAGE : 3 * PAGE])
    backend.unmap(address, handle)
    backend.release(handle)
    backend.free(address, PAGE)


def test_a_copy_may_begin_and_end_inside_of_a_page(backend: Backend, host: torch.Tensor) -> None:
    address = backend.reserve(2 * PAGE)
    handles = [backend.create(PAGE) for _ in range(2)]
    for index, handle in enumerate(handles):
        backend.map(address + index * PAGE, handle)
    backend.copy_in(address, host.data_ptr(), 2 * PAGE)
    backend.copy_in(address + PAGE - 512, host.data_ptr() + 3 * PAGE, 1024)
    backend.finish_copies()
    found = backend.tensor(address, 2 * PAGE).to(host.device, copy=True)
    assert found[PAGE - 512 : PAGE + 512].equal(host[3 * PAGE : 3 * PAGE + 1024])
    assert found[: PAGE - 512].equal(host[: PAGE - 512])
    assert found[PAGE + 512 :].equal(host[PAGE + 512 : 2 * PAGE])
    for index, handle in enumerate(handles):
        backend.unmap(address + index * PAGE, handle)
        backend.release(handle)
    backend.free(address, 2 * PAGE)


def test_a_copy_to_addresses_that_are_not_mapped_is_refused_as_a_whole(
    backend: Backend, host: torch.Tensor
) -> None:
    address = backend.reserve(4 * PAGE)
    handle = backend.create(PAGE)
    backend.map(address + PAGE, handle)
    backend.tensor(address, 4 * PAGE)[PAGE : 2 * PAGE].fill_(5)
    backend.fence(0).wait()
    before = host.clone()
    for start, num_bytes in ((0, PAGE), (0, 2 * PAGE), (PAGE, 2 * PAGE), (2 * PAGE - 8, 16)):
        with pytest.raises(PageStateError):
            backend.copy_in(address + start, host.data_ptr(), num_bytes)
        with pytest.raises(PageStateError):
            backend.copy_out(host.data_ptr(), address + start, num_bytes)
    backend.finish_copies()
    run = backend.tensor(address, 4 * PAGE)[PAGE : 2 * PAGE]
    assert int(run.min()) == int(run.max()) == 5
    assert host.equal(before)
    backend.unmap(address + PAGE, handle)
    backend.release(handle)
    backend.free(address, 4 * PAGE)
