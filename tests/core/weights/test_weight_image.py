"""The image: what is resident are always its first pages, whatever fails."""

import ctypes
import signal
from typing import Any, cast

import pytest
from helpers.backends import CountingBackend, FaultyBackend
from helpers.fake_driver import FakeDriver, Result, tensors_on_the_host
from helpers.forked import exit_code_of_child
from helpers.process_memory import resident_bytes

from kvcached_core.errors import BackendError, PageStateError
from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import MIB
from kvcached_core.weights.image import Image
from kvcached_core.weights.layout import Layout, lay_out

PAGE = 2 * MIB
SIZES = [("embedding", 3 * MIB + 1), ("layer.0", 5 * MIB), ("layer.1", 5 * MIB), ("norm", 700)]
NUM_PAGES = 7


def layout() -> Layout:
    found = lay_out(SIZES, PAGE)
    assert (found.page_bytes, found.num_pages) == (PAGE, NUM_PAGES)
    return found


def test_resident_pages_are_the_first_ones_and_the_kernel_says_so_too() -> None:
    image = Image(HostBackend(), layout())
    assert image.num_resident_pages == 0
    for change, expected in ((3, 3), (4, 7), (-2, 5), (-5, 0), (1, 1), (0, 1)):
        image.map_next(change) if change >= 0 else image.drop_last(-change)
        assert image.num_resident_pages == expected
        assert sorted(image.arena.resident_pages) == list(range(expected))
        assert resident_bytes(image.arena.address, image.arena.num_bytes) == expected * PAGE
    image.close()


def test_a_piece_is_exactly_its_bytes_in_their_place() -> None:
    found = layout()
    image = Image(HostBackend(), found)
    image.map_next(NUM_PAGES)
    for value, piece in enumerate(found.pieces, 1):
        tensor = image.tensor(piece)
        assert tensor.untyped_storage().nbytes() == tensor.numel() == piece.num_bytes
        assert tensor.data_ptr() == image.page_address(0) + piece.offset_bytes
        tensor.fill_(value)
    whole = image.pages_tensor(0, NUM_PAGES)
    for value, piece in enumerate(found.pieces, 1):
        assert int((whole == value).sum()) == piece.num_bytes
    assert image.pages_tensor(2, 3).data_ptr() == image.page_address(2)
    image.close()


def test_what_lies_between_pieces_is_zero_when_a_page_comes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors_on_the_host(monkeypatch)
    driver = FakeDriver()  # its new memory is full of garbage
    image = Image(CudaBackend(api=cast("Any", driver)), layout())
    image.map_next(3)
    assert not image.pages_tensor(0, 3).any()
    image.drop_last(2)
    before = driver.calls["cuMemsetD8Async"]
    image.map_next(2)  # who maps them again brings all of their bytes
    assert driver.calls["cuMemsetD8Async"] == before
    image.drop_last(1)
    image.map_next(5)
    assert not image.pages_tensor(3, 4).any()
    image.close()
    assert driver.created_bytes == 0


@pytest.mark.parametrize("num_pages", [-1, 5, 100])
def test_more_pages_than_there_are_is_refused_and_changes_nothing(num_pages: int) -> None:
    image = Image(HostBackend(), layout())
    image.map_next(3)
    with pytest.raises(PageStateError, match="lacks 4"):
        image.map_next(num_pages)
    with pytest.raises(PageStateError, match="has 3"):
        image.drop_last(num_pages)
    assert image.num_resident_pages == 3
    image.close()


CALLS = [
    "cuMemCreate",
    "cuMemMap",
    "cuMemSetAccess",
    "cuMemsetD8Async",
    "cuStreamSynchronize",
    "cuMemUnmap",
    "cuMemRelease",
]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("name", CALLS)
def test_a_failure_at_any_call_leaves_the_first_pages(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    tensors_on_the_host(monkeypatch)
    driver = FakeDriver()
    image = Image(CudaBackend(api=cast("Any", driver)), layout())
    image.map_next(2)
    first = driver.calls[name]
    driver.fails = lambda called, count: (
        Result.CUDA_ERROR_UNKNOWN if (called, count) == (name, first + number) else None
    )
    has_failed = False
    for change in (3, -4, 5, -6):
        before = image.num_resident_pages
        try:
            image.map_next(change) if change > 0 else image.drop_last(-change)
        except BackendError:
            has_failed = True
            assert change < 0 or image.num_resident_pages == before
        except PageStateError:
            assert has_failed
        assert sorted(image.arena.resident_pages) == list(range(image.num_resident_pages))
        assert driver.mapped_bytes == image.num_resident_pages * PAGE
    assert has_failed or driver.calls[name] <= first + number
    driver.fails = lambda _name, _number: None
    image.close()
    assert (driver.mapped_bytes, driver.created_bytes) == (0, 0)


@pytest.mark.parametrize("name", ["cuMemMap", "cuMemSetAccess", "cuMemsetD8Async"])
def test_a_map_that_cannot_be_undone_leaves_the_first_pages_and_says_why_it_failed(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tensors_on_the_host(monkeypatch)
    driver = FakeDriver()
    image = Image(CudaBackend(api=cast("Any", driver)), layout())
    image.map_next(2)
    failing = driver.calls[name] + (name != "cuMemsetD8Async")
    driver.fails = lambda called, count: (
        Result.CUDA_ERROR_UNKNOWN
        if called == "cuMemUnmap" or (called, count) == (name, failing)
        else None
    )
    with pytest.raises(BackendError, match=name):
        image.map_next(3)
    assert sorted(image.arena.resident_pages) == [0, 1]
    driver.fails = lambda _name, _number: None
    image.map_next(5)
    assert not image.pages_tensor(2, 5).any()
    assert driver.mapped_bytes == driver.created_bytes == NUM_PAGES * PAGE
    image.close()


def test_a_map_that_fails_on_the_host_leaves_what_was_there() -> None:
    for number in range(4):
        counting = CountingBackend(HostBackend())
        faulty = FaultyBackend(
            counting, lambda verb, count, number=number: (verb, count) == ("map", 2 + number)
        )
        image = Image(faulty, layout())
        image.map_next(2)
        with pytest.raises(BackendError):
            image.map_next(4)
        assert image.num_resident_pages == 2
        assert counting.created_bytes == 2 * PAGE
        image.close()


def test_a_touch_of_a_dropped_page_ends_the_process_and_of_a_resident_one_does_not() -> None:
    image = Image(HostBackend(), layout())
    image.map_next(NUM_PAGES)
    image.drop_last(3)
    last = image.layout.pieces[-1]

    def touch(address: int) -> int:
        return exit_code_of_child(lambda: ctypes.memset(address, 1, 1))  # torch would start threads

    assert touch(image.page_address(4) - 1) == 0
    assert touch(image.page_address(4)) == -signal.SIGSEGV
    assert touch(image.tensor(last).data_ptr()) == -signal.SIGSEGV
    image.close()


def test_close_gives_everything_back_once() -> None:
    counting = CountingBackend(HostBackend())
    image = Image(counting, layout())
    image.map_next(NUM_PAGES)
    image.close()
    image.close()
    assert counting.created_bytes == 0
