"""One contract for every backend; the layers keep it and add what they add."""

import ctypes
import resource
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from helpers.process_memory import resident_bytes

from kvcached_core.errors import BackendError, OutOfMemoryError, PageStateError
from kvcached_core.units import MIB
from kvcached_core.vmm.backend import Backend, Layer
from kvcached_core.vmm.faulty import FaultyBackend
from kvcached_core.vmm.host import HostBackend
from kvcached_core.vmm.limited import LimitedBackend
from kvcached_core.vmm.metered import MeteredBackend

PAGE = 2 * MIB

BACKENDS: dict[str, Callable[[], Backend]] = {
    "host": HostBackend,
    "layer": lambda: Layer(HostBackend()),
    "metered": lambda: MeteredBackend(HostBackend()),
    "limited": lambda: LimitedBackend(HostBackend(), 64 * MIB),
    "faulty": lambda: FaultyBackend(HostBackend(), lambda _verb, _number: False),
    "stacked": lambda: MeteredBackend(LimitedBackend(HostBackend(), 64 * MIB)),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]()


def test_a_reservation_is_aligned_and_holds_no_memory(backend: Backend) -> None:
    address = backend.reserve(1024 * PAGE)
    assert address % backend.granularity_bytes == 0
    assert resident_bytes(address, 1024 * PAGE) == 0
    backend.free(address, 1024 * PAGE)


def test_mapped_memory_is_zero_writable_and_resident(backend: Backend) -> None:
    address = backend.reserve(8 * PAGE)
    handle = backend.create(PAGE)
    backend.map(address + 3 * PAGE, handle)
    tensor = backend.tensor(address, 8 * PAGE)
    run = tensor[3 * PAGE : 4 * PAGE]
    assert resident_bytes(address, 8 * PAGE) == PAGE
    assert not run.any()
    run.fill_(7)
    assert int(run.sum(dtype=torch.int64)) == 7 * PAGE
    backend.unmap(address + 3 * PAGE, handle)
    assert resident_bytes(address, 8 * PAGE) == 0
    backend.release(handle)
    backend.free(address, 8 * PAGE)


def test_memory_mapped_again_reads_as_zero(backend: Backend) -> None:
    address = backend.reserve(PAGE)
    for _ in range(2):
        handle = backend.create(PAGE)
        backend.map(address, handle)
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


TOUCH = """
import ctypes
from kvcached_core.vmm.host import HostBackend
backend = HostBackend()
page = backend.granularity_bytes
address = backend.reserve(2 * page)
handle = backend.create(page)
backend.map(address, handle)
ctypes.c_char.from_address(address).value = b"x"
print("mapped page touched", flush=True)
{prepare}
ctypes.c_char.from_address(address + {offset}).value{write}
print("unmapped page touched", flush=True)
"""


@pytest.mark.parametrize("write", ["", ' = b"x"'], ids=["read", "write"])
@pytest.mark.parametrize(
    ("prepare", "offset"),
    [("", "page"), ("backend.unmap(address, handle)", "0")],
    ids=["never mapped", "unmapped"],
)
def test_touching_an_unmapped_page_ends_the_process(prepare: str, offset: str, write: str) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    script = TOUCH.format(prepare=prepare, offset=offset, write=write)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.stdout.decode().splitlines() == ["mapped page touched"]
    assert done.returncode == -signal.SIGSEGV


def test_metered_counts_calls_bytes_and_failures() -> None:
    backend = MeteredBackend(LimitedBackend(HostBackend(), PAGE))
    first = backend.create(PAGE)
    with pytest.raises(OutOfMemoryError):
        backend.create(PAGE)
    statistics = backend.statistics
    assert (statistics.of("create").num_calls, statistics.of("create").num_failures) == (1, 1)
    assert statistics.created_bytes == PAGE
    backend.release(first)
    assert statistics.created_bytes == 0
    assert statistics.of("create").seconds > 0


def test_limited_says_what_was_needed_and_available() -> None:
    backend = LimitedBackend(HostBackend(), 3 * PAGE)
    handle = backend.create(2 * PAGE)
    with pytest.raises(OutOfMemoryError) as caught:
        backend.create(2 * PAGE)
    assert (caught.value.needed_bytes, caught.value.available_bytes) == (2 * PAGE, PAGE)
    assert isinstance(caught.value, MemoryError)
    backend.release(handle)
    backend.create(3 * PAGE)


def test_faulty_fails_the_chosen_call_only() -> None:
    backend = FaultyBackend(HostBackend(), lambda verb, number: (verb, number) == ("create", 1))
    backend.create(PAGE)
    with pytest.raises(OutOfMemoryError, match="injected"):
        backend.create(PAGE)
    backend.create(PAGE)


def test_a_tensor_over_reserved_addresses_touches_nothing() -> None:
    backend = HostBackend()
    address = backend.reserve(512 * 1024 * MIB)
    tensor = backend.tensor(address, 512 * 1024 * MIB)
    assert tensor.data_ptr() == address
    assert tensor.numel() == tensor.untyped_storage().nbytes() == 512 * 1024 * MIB
    assert ctypes.addressof(ctypes.c_char.from_address(address)) == address
    del tensor
    backend.free(address, 512 * 1024 * MIB)
