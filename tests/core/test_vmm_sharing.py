"""Memory that other processes may map: the same bytes there, for as long as anybody has it."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from helpers.fake_driver import FakeDriver, Result

from kvcached_core.errors import BackendError, PageStateError
from kvcached_core.memory.vmm.backend import SharingBackend
from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.memory.vmm.shared_host import SharedHostBackend
from kvcached_core.units import MIB

PAGE = 2 * MIB


def sharing_cuda(driver: FakeDriver | None = None) -> CudaBackend:
    return CudaBackend(api=cast("Any", driver or FakeDriver()), is_sharing=True)


@pytest.fixture(params=[SharedHostBackend, sharing_cuda], ids=["host", "cuda"])
def make(request: pytest.FixtureRequest) -> Callable[[], SharingBackend]:
    return cast("Callable[[], SharingBackend]", request.param)


def mapped(backend: SharingBackend, word: bytes = b"") -> tuple[int, Any]:
    """Return the address of a new page that begins with a word, and its handle."""
    handle = backend.create(PAGE)
    address = backend.reserve(PAGE)
    backend.map(address, handle)
    ctypes.memmove(address, word, len(word))
    return address, handle


def imported(backend: SharingBackend, fd: int) -> tuple[int, Any]:
    """Return where a descriptor's memory is mapped, and its handle; the descriptor is closed."""
    handle = backend.import_handle(fd, PAGE)
    os.close(fd)
    address = backend.reserve(PAGE)
    backend.map(address, handle)
    return address, handle


def num_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_another_backend_sees_the_same_bytes_and_copies_them(
    make: Callable[[], SharingBackend],
) -> None:
    theirs, ours = make(), make()
    their_address, handle = mapped(theirs, b"first")
    source, _ = imported(ours, theirs.export_handle(handle))
    ctypes.memmove(their_address, b"later", 5)
    address, _ = mapped(ours)
    ours.copy_between(address, source, PAGE)
    ours.finish_copies()
    assert ctypes.string_at(address, 5) == b"later"


def test_memory_stays_for_who_has_it_when_its_owner_gave_it_back(
    make: Callable[[], SharingBackend],
) -> None:
    theirs, ours = make(), make()
    their_address, handle = mapped(theirs, b"stays")
    source, copy = imported(ours, theirs.export_handle(handle))
    theirs.unmap(their_address, handle)
    theirs.release(handle)
    mapped(theirs, b"other")  # what it gets next is other memory
    assert ctypes.string_at(source, 5) == b"stays"
    ours.unmap(source, copy)
    ours.release(copy)


def test_what_is_zeroed_is_zeros_whatever_was_in_it(make: Callable[[], SharingBackend]) -> None:
    backend = make()
    address, handle = mapped(backend, b"before")
    backend.unmap(address, handle)
    backend.map(address, handle)
    backend.zero(address, PAGE)
    backend.synchronize()
    assert not any(ctypes.string_at(address, PAGE))


def test_a_copy_between_ranges_of_which_one_is_not_mapped_is_refused(
    make: Callable[[], SharingBackend],
) -> None:
    backend = make()
    address, _ = mapped(backend)
    other = backend.reserve(PAGE)
    for to, source in ((address, other), (other, address)):
        with pytest.raises(PageStateError):
            backend.copy_between(to, source, PAGE)


def test_what_was_imported_is_not_memory_of_this_device() -> None:
    driver = FakeDriver()
    theirs, ours = sharing_cuda(), sharing_cuda(driver)
    _, handle = mapped(theirs)
    imported(ours, theirs.export_handle(handle))
    assert (driver.created_bytes, driver.num_imported) == (0, 1)


def test_memory_that_was_not_created_for_it_cannot_be_exported() -> None:
    backend = CudaBackend(api=cast("Any", FakeDriver()))
    with pytest.raises(BackendError, match="cuMemExportToShareableHandle failed"):
        backend.export_handle(backend.create(PAGE))
    shared = SharedHostBackend()
    with pytest.raises(BackendError, match="HostHandle is not one of this backend"):
        shared.export_handle(HostBackend().create(PAGE))


def test_without_peer_access_nothing_is_mapped() -> None:
    driver = FakeDriver()
    driver.has_peer_access = False
    theirs, ours = sharing_cuda(), sharing_cuda(driver)
    _, handle = mapped(theirs)
    with pytest.raises(BackendError, match="cuMemSetAccess failed: CUDA_ERROR_INVALID_DEVICE"):
        imported(ours, theirs.export_handle(handle))
    assert not driver._mapped


def test_a_file_of_another_size_is_refused() -> None:
    backend = SharedHostBackend()
    fd = backend.export_handle(backend.create(2 * PAGE))
    with pytest.raises(BackendError, match="it has 4194304 bytes"):
        backend.import_handle(fd, PAGE)
    os.close(fd)
    with pytest.raises(BackendError, match="import failed: EBADF"):
        backend.import_handle(fd, PAGE)


@pytest.mark.parametrize(
    "name", ["cuMemExportToShareableHandle", "cuMemImportFromShareableHandle", "cuMemcpyAsync"]
)
def test_a_call_that_fails_is_named(name: str) -> None:
    driver = FakeDriver()
    backend = sharing_cuda(driver)
    address, handle = mapped(backend)
    driver.fails = lambda called, _: Result.CUDA_ERROR_NOT_SUPPORTED if called == name else None

    def copy_own_page() -> None:
        source, _ = imported(backend, backend.export_handle(handle))
        backend.copy_between(address, source, PAGE)

    with pytest.raises(BackendError, match=f"{name} failed: CUDA_ERROR_NOT_SUPPORTED"):
        copy_own_page()


def test_a_file_is_gone_when_nobody_has_it() -> None:
    theirs, ours = SharedHostBackend(), SharedHostBackend()
    before = num_descriptors()
    their_address, handle = mapped(theirs)
    source, copy = imported(ours, theirs.export_handle(handle))
    theirs.unmap(their_address, handle)
    theirs.release(handle)
    ours.unmap(source, copy)
    ours.release(copy)
    assert num_descriptors() == before
