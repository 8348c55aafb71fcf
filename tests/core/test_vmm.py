"""One contract for every backend; the layers keep it and add what they add."""

import ctypes
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
from helpers.backends import CountingBackend, FaultyBackend, Layer, LimitedBackend
from helpers.contract import *  # noqa: F403  the tests that every backend passes
from helpers.contract import PAGE, Resident
from helpers.fake_driver import FakeDriver, tensors_on_the_host
from helpers.process_memory import resident_bytes

from kvcached_core.errors import BackendError, OutOfMemoryError
from kvcached_core.memory.vmm.backend import Backend
from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.memory.vmm.host import MAP_FAILED, HostBackend, libc
from kvcached_core.memory.vmm.shared_host import SharedHostBackend
from kvcached_core.units import MIB

BACKENDS: dict[str, Callable[[], Backend]] = {
    "host": HostBackend,
    "cuda": lambda: CudaBackend(api=cast("Any", FakeDriver())),
    "shared host": SharedHostBackend,
    "sharing cuda": lambda: CudaBackend(api=cast("Any", FakeDriver()), is_sharing=True),
    "layer": lambda: Layer(HostBackend()),
    "counting": lambda: CountingBackend(HostBackend()),
    "limited": lambda: LimitedBackend(HostBackend(), 64 * MIB),
    "faulty": lambda: FaultyBackend(HostBackend(), lambda _verb, _number: False),
    "stacked": lambda: CountingBackend(LimitedBackend(HostBackend(), 64 * MIB)),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    tensors_on_the_host(monkeypatch)
    return BACKENDS[request.param]()


@pytest.fixture
def resident() -> Resident:
    return resident_bytes


TOUCH = """
import ctypes
from kvcached_core.memory.vmm.host import HostBackend
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


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EACCES])
@pytest.mark.parametrize(
    ("make", "call"),
    [
        (HostBackend, "mprotect"),
        (HostBackend, "madvise"),
        (SharedHostBackend, "mmap"),
        (SharedHostBackend, "madvise"),
    ],
)
def test_what_linux_refuses_for_want_of_memory_is_told_as_that_and_nothing_else_is(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], HostBackend], call: str, code: int
) -> None:
    backend = make()
    address, handle = backend.reserve(PAGE), backend.create(PAGE)

    def refuse(*_: object) -> int | None:
        ctypes.set_errno(code)
        return MAP_FAILED if call == "mmap" else -1

    with monkeypatch.context() as patched:
        patched.setattr(libc, call, refuse)
        with pytest.raises(BackendError) as caught:
            backend.map(address, handle)
    assert (caught.value.call, caught.value.code) == ("map", errno.errorcode[code])
    assert isinstance(caught.value, OutOfMemoryError) == (code == errno.ENOMEM)
    backend.map(address, handle)


@pytest.mark.parametrize("call", ["memfd_create", "ftruncate"])
def test_a_file_that_finds_no_memory_is_told_as_that(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "refused")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OutOfMemoryError, match="create failed: ENOMEM"):
        SharedHostBackend().create(PAGE)


def test_counting_counts_calls_of_a_thread_and_bytes() -> None:
    backend = CountingBackend(LimitedBackend(HostBackend(), PAGE))
    first = backend.create(PAGE)
    with pytest.raises(OutOfMemoryError):
        backend.create(PAGE)
    assert backend.created_bytes == PAGE
    backend.release(first)
    assert backend.created_bytes == 0
    assert backend.num_calls_of_thread(threading.get_ident()) == 3


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
