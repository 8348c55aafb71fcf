"""What every backend keeps; a module that imports these tests has a `backend` fixture.

`resident` is a fixture too: a function that returns the bytes that are resident in a range.
"""

from collections.abc import Callable

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
