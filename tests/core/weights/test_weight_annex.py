"""What an engine keeps beside its weights goes, and comes back as it was, where it was."""

import ctypes
import signal
from collections.abc import Iterator, Mapping

import pytest
import torch
from helpers.backends import FaultyBackend, LimitedBackend
from helpers.forked import exit_code_of_child
from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.errors import BackendError, HostBudgetError, OutOfMemoryError, PageStateError
from kvcached_core.memory.vmm.backend import Backend
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import KIB
from kvcached_core.weights import annex as annex_module
from kvcached_core.weights.annex import Annex, Ranges

UNIT = 64 * KIB


class Shelf:
    """Host memory of any size; it notes what it was asked for. `backend` may page-lock it."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.backend: Backend | None = None
        self._bytes = (ctypes.c_int8 * 0)()
        self.is_full = False

    def room(self, num_bytes: int) -> int:
        if self.is_full:
            raise HostBudgetError("full", num_bytes, 0)
        self.asked.append(num_bytes)
        if num_bytes > len(self._bytes):
            if self.backend is not None and len(self._bytes):
                self.backend.unregister(ctypes.addressof(self._bytes))
            self._bytes = (ctypes.c_int8 * num_bytes)()
            if self.backend is not None:
                self.backend.register(ctypes.addressof(self._bytes), num_bytes)
        return ctypes.addressof(self._bytes)


class Owner:
    """A tenant all of whose spans are in use, but for those that it has let go."""

    def __init__(self) -> None:
        self.used: dict[int, Ranges] = {}

    def in_use(self, spans: Mapping[int, int]) -> Mapping[int, Ranges]:
        return {
            address: self.used.get(address, [(address, size)]) for address, size in spans.items()
        }


class Releasing(Owner):
    """One that has let everything go."""

    def in_use(self, spans: Mapping[int, int]) -> Mapping[int, Ranges]:
        return {}


@pytest.fixture
def granularity_bytes() -> int:
    return UNIT


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def annex(backend: Backend, shelf: Shelf) -> Iterator[Annex]:
    shelf.backend = backend  # so copies are done when somebody waits for them
    made = Annex(backend, shelf.room)
    yield made
    made.close()


def words(annex: Annex, address: int, num_units: int) -> torch.Tensor:
    """Return what is in a span, a row for each unit."""
    whole = annex.backend.tensor(address, num_units * UNIT)
    return whole.view(torch.int64).view(num_units, -1)


def taken(annex: Annex, owner: Owner, num_units: int, *full: int) -> torch.Tensor:
    """Return a span's words: numbers in the units that are named, zeros in the others."""
    found = words(annex, annex.take(num_units * UNIT, owner), num_units)
    found.zero_()
    for unit in full:
        found[unit] = torch.arange(found.shape[1]) + unit
    return found


def come_back(annex: Annex) -> None:
    annex.bring()
    annex.backend.synchronize()
    annex.backend.finish_copies()


def test_what_is_in_use_comes_back_where_it_was(annex: Annex) -> None:
    owner = Owner()
    spans = [taken(annex, owner, 3, 1), taken(annex, owner, 1), taken(annex, owner, 4, 0, 1, 3)]
    before = [span.clone() for span in spans]
    for _ in range(2):
        annex.drop()
        assert (annex.resident_bytes, annex.num_bytes) == (0, 8 * UNIT)
        come_back(annex)
        assert annex.resident_bytes == 8 * UNIT
        assert all(torch.equal(now, then) for now, then in zip(spans, before, strict=True))


def test_only_what_is_not_zero_is_kept_in_host_memory(annex: Annex, shelf: Shelf) -> None:
    owner = Owner()
    taken(annex, owner, 8, 2, 3)
    taken(annex, owner, 2)
    annex.drop()
    assert shelf.asked == [2 * UNIT]


def test_one_number_in_the_last_word_of_a_unit_is_kept(annex: Annex) -> None:
    span = taken(annex, Owner(), 2)
    span[1, -1] = 1 << 62
    annex.drop()
    come_back(annex)
    assert span[1, -1] == 1 << 62
    assert int(span.count_nonzero()) == 1


def test_what_is_not_in_use_is_not_kept_and_comes_back_as_zeros(annex: Annex, shelf: Shelf) -> None:
    owner = Owner()
    span = taken(annex, owner, 4, 0, 1, 2, 3)
    owner.used = {span.data_ptr(): [(span.data_ptr() + 2 * UNIT + 8, 16)]}
    annex.drop()
    assert shelf.asked == [UNIT]
    come_back(annex)
    assert [int(row.count_nonzero() > 0) for row in span] == [0, 0, 1, 0]
    assert torch.equal(span[2], torch.arange(span.shape[1]) + 2)


@given(
    data=st.data(),
    sizes=st.lists(st.integers(min_value=1, max_value=6), min_size=1, max_size=5),
    num_rounds=st.integers(min_value=1, max_value=3),
)
def test_any_content_survives(data: st.DataObject, sizes: list[int], num_rounds: int) -> None:
    annex = Annex(HostBackend(UNIT), Shelf().room)
    owner = Owner()
    spans = [taken(annex, owner, size) for size in sizes]
    try:
        for number in range(num_rounds):
            for span in spans:
                for unit in data.draw(st.sets(st.integers(0, span.shape[0] - 1))):
                    span[unit] = 0 if data.draw(st.booleans()) else unit + number + 1
            before = [span.clone() for span in spans]
            annex.drop()
            come_back(annex)
            assert all(torch.equal(now, then) for now, then in zip(spans, before, strict=True))
    finally:
        annex.close()


def test_a_copy_does_not_cross_where_host_memory_may_be_cut(
    annex: Annex, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annex_module, "MAX_COPY_BYTES", 2 * UNIT)
    copies: list[tuple[int, int]] = []
    backend = annex.backend
    copy_out = backend.copy_out

    def note(host_address: int, address: int, num_bytes: int) -> None:
        copies.append((host_address, num_bytes))
        copy_out(host_address, address, num_bytes)

    monkeypatch.setattr(backend, "copy_out", note)
    owner = Owner()
    spans = [taken(annex, owner, 1, 0), taken(annex, owner, 5, 0, 1, 2, 3, 4)]
    before = [span.clone() for span in spans]
    annex.drop()
    base = shelf.room(0)
    assert [(at - base) // UNIT for at, _ in copies] == [0, 1, 2, 4]
    assert [size // UNIT for _, size in copies] == [1, 1, 2, 2]
    come_back(annex)
    assert all(torch.equal(now, then) for now, then in zip(spans, before, strict=True))


def test_while_it_is_gone_a_touch_ends_the_process() -> None:
    annex = Annex(HostBackend(UNIT), Shelf().room)
    span = taken(annex, Owner(), 1, 0)
    annex.drop()
    assert exit_code_of_child(lambda: print(span[0, 0])) == -signal.SIGSEGV
    annex.close()


def test_a_span_that_nobody_uses_is_given_back(annex: Annex) -> None:
    taken(annex, Owner(), 1, 0)
    taken(annex, Releasing(), 3, 0)
    assert annex.num_bytes == 4 * UNIT
    annex.prepare()
    assert annex.num_bytes == annex.resident_bytes == UNIT


def test_without_room_in_host_memory_nothing_goes(annex: Annex, shelf: Shelf) -> None:
    span = taken(annex, Owner(), 2, 1)
    before = span.clone()
    shelf.is_full = True
    with pytest.raises(HostBudgetError):
        annex.drop()
    assert annex.is_there
    assert torch.equal(span, before)


def test_without_memory_nothing_comes_and_it_comes_later(shelf: Shelf) -> None:
    backend = LimitedBackend(HostBackend(UNIT), 4 * UNIT)
    annex, owner = Annex(backend, shelf.room), Owner()
    spans = [taken(annex, owner, 2, 0), taken(annex, owner, 2, 1)]
    before = [span.clone() for span in spans]
    annex.drop()
    backend.limit_bytes = 3 * UNIT
    with pytest.raises(OutOfMemoryError):
        annex.bring()
    assert (annex.is_there, annex.resident_bytes, backend.created_bytes) == (False, 0, 0)
    backend.limit_bytes = 4 * UNIT
    come_back(annex)
    assert all(torch.equal(now, then) for now, then in zip(spans, before, strict=True))
    annex.close()


def test_what_could_not_be_unmapped_goes_with_the_next_drop(shelf: Shelf) -> None:
    is_broken = True
    backend = FaultyBackend(HostBackend(UNIT), lambda verb, _: is_broken and verb == "unmap")
    annex = Annex(backend, shelf.room)
    span = taken(annex, Owner(), 1, 0)
    before = span.clone()
    with pytest.raises(BackendError):
        annex.drop()
    assert not annex.is_there
    is_broken = False
    annex.drop()
    assert annex.resident_bytes == 0
    come_back(annex)
    assert torch.equal(span, before)
    annex.close()


def test_nothing_is_taken_of_one_that_is_gone(annex: Annex) -> None:
    annex.drop()
    with pytest.raises(PageStateError, match="not there"):
        annex.take(1, Owner())


def test_a_span_that_finds_no_memory_leaves_nothing_behind(shelf: Shelf) -> None:
    backend = LimitedBackend(HostBackend(UNIT), UNIT)
    annex = Annex(backend, shelf.room)
    with pytest.raises(OutOfMemoryError):
        annex.take(2 * UNIT, Owner())
    assert annex.num_bytes == 0
    assert annex.sizes(Owner()) == {}


def test_a_range_outside_of_its_span_is_refused(annex: Annex) -> None:
    owner = Owner()
    span = taken(annex, owner, 2)
    owner.used = {span.data_ptr(): [(span.data_ptr() + UNIT, UNIT + 8)]}
    with pytest.raises(PageStateError, match="are in use"):
        annex.drop()
