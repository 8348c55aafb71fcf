"""The CUDA backend over a fake driver that keeps the real one's rules and can fail any call."""

import ctypes
import mmap
import threading
from typing import Any, cast

import pytest
import torch
from helpers.fake_driver import FakeDriver, Result, tensors_on_the_host

from kvcached_core.errors import BackendError, OutOfMemoryError
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import choose_geometry
from kvcached_core.memory.vmm.cuda import MAX_DRAINS, CudaBackend
from kvcached_core.units import MIB

GEOMETRY = choose_geometry(
    block_bytes=65536, num_planes=8, granularity_bytes=2 * MIB, target_page_bytes=4 * MIB
)
PAGE = GEOMETRY.page_bytes


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    tensors_on_the_host(monkeypatch)
    return FakeDriver(capacity_bytes=8 * PAGE)


def open_backend(driver: FakeDriver) -> CudaBackend:
    return CudaBackend(api=cast("Any", driver))


def fail_once(driver: FakeDriver, name: str, number: int, code: Any) -> None:
    driver.fails = lambda called, count: code if (called, count) == (name, number) else None


def test_sizes_are_asked_of_the_driver(driver: FakeDriver) -> None:
    driver.granularity_bytes = 4 * MIB
    backend = open_backend(driver)
    assert backend.granularity_bytes == 4 * MIB
    assert (backend.total_bytes, backend.free_bytes) == (8 * PAGE, 8 * PAGE)
    backend.create(4 * MIB)
    assert backend.free_bytes == 8 * PAGE - 4 * MIB


def test_out_of_memory_says_what_was_needed_and_available(driver: FakeDriver) -> None:
    backend = open_backend(driver)
    backend.create(6 * PAGE)
    with pytest.raises(OutOfMemoryError) as caught:
        backend.create(3 * PAGE)
    error = caught.value
    assert (error.call, error.code) == ("cuMemCreate", "CUDA_ERROR_OUT_OF_MEMORY")
    assert (error.needed_bytes, error.available_bytes) == (3 * PAGE, 2 * PAGE)


def test_every_thread_gets_the_context_and_gets_it_once(driver: FakeDriver) -> None:
    backend = open_backend(driver)

    def work() -> None:
        for _ in range(2):
            backend.release(backend.create(PAGE))

    thread = threading.Thread(target=work, name="other")
    thread.start()
    thread.join()
    assert driver.created_bytes == 0
    assert driver.calls["cuCtxSetCurrent"] == 2
    assert "other" in driver.threads["cuCtxSetCurrent"]


STEPS = [
    *((("cuMemCreate", Result.CUDA_ERROR_OUT_OF_MEMORY), number) for number in range(3)),
    *((("cuMemMap", Result.CUDA_ERROR_INVALID_VALUE), number) for number in range(3)),
    *((("cuMemSetAccess", Result.CUDA_ERROR_UNKNOWN), number) for number in range(3)),
    (("cuMemsetD8Async", Result.CUDA_ERROR_LAUNCH_FAILED), 0),
]


@pytest.mark.parametrize(("step", "number"), STEPS)
def test_a_failure_at_any_call_of_mapping_leaves_nothing_behind(
    driver: FakeDriver, step: tuple[str, Any], number: int
) -> None:
    name, code = step
    arena = Arena(open_backend(driver), GEOMETRY, 8)
    arena.map([7])
    fail_once(driver, name, driver.calls[name] + number, code)
    with pytest.raises(BackendError) as caught:
        arena.map([0, 1, 2])
    assert (caught.value.call, caught.value.code) == (name, code.name)
    assert caught.value.needed_bytes == (PAGE if name != "cuMemsetD8Async" else 3 * PAGE)
    assert arena.resident_pages == [7]
    assert driver.mapped_bytes == driver.created_bytes == PAGE
    arena.map([0, 1, 2])
    assert driver.mapped_bytes == 4 * PAGE
    arena.close()
    assert driver.created_bytes == 0


def test_a_map_whose_access_is_refused_is_undone_at_once(driver: FakeDriver) -> None:
    backend = open_backend(driver)
    address, handle = backend.reserve(PAGE), backend.create(PAGE)
    fail_once(driver, "cuMemSetAccess", 0, Result.CUDA_ERROR_UNKNOWN)
    with pytest.raises(BackendError, match="cuMemSetAccess"):
        backend.map(address, handle)
    assert (driver.mapped_bytes, driver.created_bytes) == (0, PAGE)
    backend.map(address, handle)
    backend.unmap(address, handle)
    backend.release(handle)
    backend.free(address, PAGE)


@pytest.mark.parametrize("again", [(1,), (2,), (2, 1), ()])
def test_a_map_whose_access_is_refused_and_that_cannot_be_undone_can_be_tried_again(
    driver: FakeDriver, again: tuple[int, ...]
) -> None:
    arena = Arena(open_backend(driver), GEOMETRY, 8)
    oom, broken = Result.CUDA_ERROR_OUT_OF_MEMORY, Result.CUDA_ERROR_UNKNOWN
    driver.fails = lambda name, _number: {"cuMemSetAccess": oom, "cuMemUnmap": broken}.get(name)
    with pytest.raises(OutOfMemoryError, match="cuMemSetAccess"):
        arena.map([1])
    with pytest.raises(BackendError, match="cuMemUnmap"):
        arena.map([1])
    assert (arena.resident_pages, driver.created_bytes) == ([], PAGE)
    driver.fails = lambda _name, _number: None
    arena.map(again)
    assert driver.created_bytes == PAGE * max(len(again), 1)
    arena.close()
    assert (driver.mapped_bytes, driver.created_bytes) == (0, 0)


def test_a_page_is_not_taken_back_before_its_zeros_are_there(driver: FakeDriver) -> None:
    arena, called = Arena(open_backend(driver), GEOMETRY, 8), list[str]()

    def fails(name: str, number: int) -> Any:
        called.append(name)
        is_second = (name, number) == ("cuMemsetD8Async", 1)
        return Result.CUDA_ERROR_LAUNCH_FAILED if is_second else None

    driver.fails = fails
    with pytest.raises(BackendError, match="cuMemsetD8Async"):
        arena.map([0, 3])
    begun = called.index("cuMemsetD8Async")
    assert "cuStreamSynchronize" in called[begun : called.index("cuMemUnmap")]
    arena.close()


def test_a_page_that_could_not_be_taken_back_is_full_of_zeros_the_next_time(
    driver: FakeDriver,
) -> None:
    arena = Arena(open_backend(driver), GEOMETRY, 8)
    oom = Result.CUDA_ERROR_OUT_OF_MEMORY
    driver.fails = lambda name, number: (
        oom if name == "cuMemUnmap" or (name, number) == ("cuMemCreate", 1) else None
    )
    with pytest.raises(OutOfMemoryError):
        arena.map([0, 1])
    driver.fails = lambda _name, _number: None
    arena.map([0])
    assert not arena.tensor()[:PAGE].any()
    assert driver.created_bytes == PAGE
    arena.close()


@pytest.mark.parametrize("name", ["cuMemUnmap", "cuMemRelease"])
def test_a_failure_of_unmapping_can_be_tried_again(driver: FakeDriver, name: str) -> None:
    arena = Arena(open_backend(driver), GEOMETRY, 8)
    arena.map([0, 1, 2])
    fail_once(driver, name, 1, Result.CUDA_ERROR_UNKNOWN)
    with pytest.raises(BackendError):
        arena.unmap([0, 1, 2])
    assert arena.resident_bytes == driver.mapped_bytes
    driver.fails = lambda _name, _number: None
    arena.close()
    assert (driver.mapped_bytes, driver.created_bytes) == (0, 0)


def test_a_map_that_is_not_ready_drains_and_is_tried_again(driver: FakeDriver) -> None:
    arena = Arena(open_backend(driver), GEOMETRY, 8)
    driver.fails = lambda name, number: (
        Result.CUDA_ERROR_NOT_READY if name == "cuMemMap" and number < 2 else None
    )
    arena.map([3])
    assert driver.calls["cuCtxSynchronize"] == 2
    assert driver.mapped_bytes == PAGE
    arena.close()


def test_a_map_that_is_never_ready_ends_with_the_drivers_word(driver: FakeDriver) -> None:
    arena = Arena(open_backend(driver), GEOMETRY, 8)
    driver.fails = lambda name, _number: Result.CUDA_ERROR_NOT_READY if name == "cuMemMap" else None
    with pytest.raises(BackendError, match="CUDA_ERROR_NOT_READY"):
        arena.map([3])
    assert driver.calls["cuCtxSynchronize"] == MAX_DRAINS
    assert driver.created_bytes == 0


def test_a_page_costs_one_create_one_map_and_one_access(driver: FakeDriver) -> None:
    arena = Arena(open_backend(driver), GEOMETRY, 8)
    before = driver.calls.copy()
    arena.map(range(5))
    cost = dict.fromkeys(("cuMemCreate", "cuMemMap", "cuMemSetAccess"), 5)
    assert driver.calls - before == cost | {"cuMemsetD8Async": 1}
    arena.close()


def test_every_new_page_is_zeroed_wherever_it_lies(driver: FakeDriver) -> None:
    arena = Arena(open_backend(driver), GEOMETRY, 8)
    arena.map([5, 1, 2, 7])
    for page in (5, 1, 2, 7):
        assert not any(ctypes.string_at(arena.address + page * PAGE, PAGE))
    arena.close()


def test_a_fence_ends_when_the_stream_is_done_and_leaves_no_event(driver: FakeDriver) -> None:
    backend = open_backend(driver)
    driver.idle.clear()
    fence = backend.fence(0)
    ended = threading.Event()

    def wait() -> None:
        fence.wait()
        ended.set()

    threading.Thread(target=wait).start()
    assert not ended.wait(0.05)
    driver.idle.set()
    assert ended.wait(60)
    fence.wait()
    assert not driver._events


EVENT_CALLS = pytest.mark.parametrize("name", ["cuEventCreate", "cuEventRecord"])


@EVENT_CALLS
def test_a_mark_that_cannot_be_made_leaves_no_event(driver: FakeDriver, name: str) -> None:
    backend = open_backend(driver)
    fail_once(driver, name, 0, Result.CUDA_ERROR_ILLEGAL_ADDRESS)
    with pytest.raises(BackendError, match=f"{name} failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
        backend.mark_copies()
    assert not driver._events


@EVENT_CALLS
def test_where_the_driver_refuses_an_event_a_fence_is_behind_all_of_its_stream(
    driver: FakeDriver, host: torch.Tensor, name: str
) -> None:
    backend = open_backend(driver)
    arena = Arena(backend, GEOMETRY, 1)
    arena.map([0])
    backend.register(host.data_ptr(), PAGE)
    fail_once(driver, name, driver.calls[name], Result.CUDA_ERROR_OUT_OF_MEMORY)
    backend.copy_in(arena.address, host.data_ptr(), PAGE)
    assert driver.is_copied_under_way(arena.address, PAGE)
    backend.finish_copies()
    assert not driver.is_copied_under_way(arena.address, PAGE)
    assert not driver._events
    arena.close()


def test_who_waits_for_a_stream_that_failed_is_told(driver: FakeDriver) -> None:
    backend = open_backend(driver)
    driver.fails = lambda *_: Result.CUDA_ERROR_ILLEGAL_ADDRESS
    fence = backend.fence(7)
    with pytest.raises(BackendError, match="cuStreamSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRE"):
        fence.wait()


def test_joining_a_stream_leaves_no_event(driver: FakeDriver) -> None:
    open_backend(driver).join(7)
    assert driver.calls["cuStreamWaitEvent"] == 1
    assert not driver._events


def test_a_missing_device_is_named(driver: FakeDriver) -> None:
    with pytest.raises(BackendError, match="cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE"):
        CudaBackend(3, api=cast("Any", driver))


def test_a_handle_of_another_backend_is_refused(driver: FakeDriver) -> None:
    from kvcached_core.memory.vmm.host import HostBackend

    backend = open_backend(driver)
    address = backend.reserve(PAGE)
    with pytest.raises(BackendError, match="HostHandle is not one of this backend"):
        backend.map(address, HostBackend().create(PAGE))


@pytest.fixture
def host() -> torch.Tensor:
    """Two pages of the host's memory."""
    return torch.frombuffer(mmap.mmap(-1, 2 * PAGE), dtype=torch.int8).fill_(3)


def test_a_copy_waits_for_nobody_and_who_needs_it_waits_for_it(
    driver: FakeDriver, host: torch.Tensor
) -> None:
    backend = open_backend(driver)
    arena = Arena(backend, GEOMETRY, 2, is_zeroed=False)
    arena.map([0])
    backend.register(host.data_ptr(), 2 * PAGE)
    backend.copy_in(arena.address, host.data_ptr(), PAGE)
    assert driver.is_copied_under_way(arena.address, PAGE)
    backend.join(0)  # what is zeroed is not what is copied
    backend.synchronize()
    assert driver.is_copied_under_way(arena.address, PAGE)
    backend.join_copies(0)
    assert arena.tensor()[:PAGE].equal(host[:PAGE])
    assert not driver._events
    arena.close()


def test_a_mark_is_behind_the_copies_that_had_begun_and_in_front_of_later_ones(
    driver: FakeDriver, host: torch.Tensor
) -> None:
    backend = open_backend(driver)
    arena = Arena(backend, GEOMETRY, 2, is_zeroed=False)
    arena.map([0, 1])
    backend.register(host.data_ptr(), 2 * PAGE)
    backend.copy_in(arena.address, host.data_ptr(), PAGE)
    mark = backend.mark_copies()
    backend.copy_in(arena.address + PAGE, host.data_ptr() + PAGE, PAGE)
    assert driver.is_copied_under_way(arena.address, PAGE)
    assert not mark.is_done()
    mark.join(0)
    assert mark.is_done()
    assert not driver.is_copied_under_way(arena.address, PAGE)
    assert driver.is_copied_under_way(arena.address + PAGE, PAGE)
    driver.fails = lambda name, _: (
        Result.CUDA_ERROR_LAUNCH_FAILED if name == "cuEventQuery" else None
    )
    with pytest.raises(BackendError, match="cuEventQuery"):
        mark.is_done()
    driver.fails = lambda _name, _number: None
    for _ in range(2):
        mark.close()
    assert not driver._events
    backend.finish_copies()
    arena.close()


def test_a_page_is_not_unmapped_under_a_copy(driver: FakeDriver, host: torch.Tensor) -> None:
    backend = open_backend(driver)
    arena = Arena(backend, GEOMETRY, 2, is_zeroed=False)
    arena.map([0])
    backend.register(host.data_ptr(), 2 * PAGE)
    backend.copy_out(host.data_ptr(), arena.address, PAGE)
    with pytest.raises(AssertionError, match="under a copy"):
        arena.unmap([0])
    backend.finish_copies()
    arena.unmap([0])
    arena.close()


def test_host_memory_is_registered_once_and_a_copy_lies_in_one_registration(
    driver: FakeDriver, host: torch.Tensor
) -> None:
    backend = open_backend(driver)
    arena = Arena(backend, GEOMETRY, 2)
    arena.map([0, 1])
    backend.register(host.data_ptr(), PAGE)
    with pytest.raises(BackendError, match="HOST_MEMORY_ALREADY_REGISTERED"):
        backend.register(host.data_ptr(), 2 * PAGE)
    with pytest.raises(BackendError, match="cuMemcpyHtoDAsync failed: CUDA_ERROR_INVALID_VALUE"):
        backend.copy_in(arena.address, host.data_ptr(), 2 * PAGE)
    backend.unregister(host.data_ptr())
    with pytest.raises(BackendError, match="HOST_MEMORY_NOT_REGISTERED"):
        backend.unregister(host.data_ptr())
    backend.copy_in(arena.address, host.data_ptr(), 2 * PAGE)
    assert arena.tensor().equal(host)
    arena.close()


def copy_both_ways(backend: CudaBackend, address: int, host_address: int) -> None:
    backend.register(host_address, PAGE)
    backend.copy_in(address, host_address, PAGE)
    backend.copy_out(host_address, address, PAGE)
    backend.join_copies(0)
    backend.finish_copies()
    backend.unregister(host_address)


COPY_CALLS = [
    "cuMemcpyHtoDAsync",
    "cuMemcpyDtoHAsync",
    "cuMemHostRegister",
    "cuMemHostUnregister",
    "cuEventCreate",
    "cuEventRecord",
    "cuStreamWaitEvent",
    "cuEventSynchronize",
]


@pytest.mark.parametrize("name", COPY_CALLS)
def test_a_copy_that_fails_says_which_call_it_was_and_leaves_no_event(
    driver: FakeDriver, host: torch.Tensor, name: str
) -> None:
    backend = open_backend(driver)
    arena = Arena(backend, GEOMETRY, 1)
    arena.map([0])
    driver.fails = lambda called, _: Result.CUDA_ERROR_LAUNCH_FAILED if called == name else None
    with pytest.raises(BackendError, match=f"{name} failed: CUDA_ERROR_LAUNCH_FAILED"):
        copy_both_ways(backend, arena.address, host.data_ptr())
    driver.fails = lambda _name, _number: None
    backend.finish_copies()
    arena.close()
    assert len(driver._events) <= (name == "cuEventSynchronize")
    assert driver.created_bytes == 0
