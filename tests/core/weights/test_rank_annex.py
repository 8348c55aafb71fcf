"""What goes with a rank's weights goes before them and comes after them, and the ledger knows."""

import ctypes
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.backends import FaultyBackend, LimitedBackend
from helpers.weight_ranks import NUM_PAGES, PAGE, WeightedRank

from kvcached_core.errors import BackendError, HostBudgetError
from kvcached_core.memory import patience
from kvcached_core.memory.vmm.backend import Backend
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.weights import rank, rank_row
from kvcached_core.weights.annex import Annex, Ranges

NUM_ANNEX_PAGES = 3
NUM_WITH = NUM_PAGES + NUM_ANNEX_PAGES


class Tenant:
    def in_use(self, spans: Mapping[int, int]) -> Mapping[int, Ranges]:
        return {address: [(address, size)] for address, size in spans.items()}


class WithAnnex:
    """A rank with an annex that is full of numbers."""

    def __init__(self, ours: WeightedRank) -> None:
        self.ours, self.weights = ours, ours.weights
        self.is_host_full = False
        self._bytes: Any = None
        self.annex = Annex(ours.image.backend, self._room)
        tenant = Tenant()
        self.addresses = [self.annex.take(units * PAGE, tenant) for units in (1, 2)]
        self.words = [
            self.annex.backend.tensor(address, units * PAGE).view(torch.int64)
            for address, units in zip(self.addresses, (1, 2), strict=True)
        ]
        for number, words in enumerate(self.words):
            words.fill_(number + 1)
        self.weights.add_annex(self.annex)

    def check(self, num_pages: int) -> None:
        """See that so many pages are there, those of the annex behind the others."""
        weights, annex = min(num_pages, NUM_PAGES), max(num_pages - NUM_PAGES, 0)
        assert self.weights.status().num_resident_pages == num_pages
        assert self.ours.image.num_resident_pages == weights
        assert self.annex.resident_bytes == annex * PAGE
        assert self.ours.view().weights_bytes == num_pages * PAGE
        if annex:
            self.annex.backend.synchronize()
            self.annex.backend.finish_copies()
            assert [int(words[0]) for words in self.words] == [1, 2]
            assert all(words.eq(words[0]).all() for words in self.words)

    def _room(self, num_bytes: int) -> int:
        if self.is_host_full:
            raise HostBudgetError("the host is full", num_bytes, 0)
        self._bytes = (ctypes.c_int8 * num_bytes)()
        return ctypes.addressof(self._bytes)


Make = Callable[..., WithAnnex]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Return what makes a rank with an annex; both are closed after the test."""
    made = list[WithAnnex]()

    def make_one(backend: Backend) -> WithAnnex:
        made.append(WithAnnex(WeightedRank(backend, tmp_path).start()))
        return made[-1]

    yield make_one
    for one in made:
        one.ours.close()
        one.annex.close()


def test_the_annex_goes_with_the_first_page_and_comes_with_the_last(
    make: Make, backend: Backend
) -> None:
    both = make(backend)
    status = both.weights.status()
    assert (status.num_pages, status.num_resident_pages) == (NUM_WITH, NUM_WITH)
    both.check(NUM_WITH)
    for wanted, found in (
        (NUM_WITH - 1, NUM_PAGES),
        (NUM_WITH, NUM_WITH),
        (NUM_PAGES, NUM_PAGES),
        (NUM_PAGES - 1, NUM_PAGES - 1),
        (NUM_PAGES, NUM_PAGES),
        (0, 0),
        (NUM_PAGES + 1, NUM_PAGES),
        (0, 0),
        (NUM_WITH + 9, NUM_WITH),
    ):
        both.weights.hold(wanted)
        both.check(found)


def test_what_is_launched_after_a_wake_waits_for_zeros_and_copies(
    make: Make, backend: Backend
) -> None:
    both = make(backend)
    both.weights.hold(0)
    both.ours.done.clear()
    both.weights.hold(NUM_WITH)
    done = both.ours.done
    last = max(index for index, verb in enumerate(done) if verb in ("copy_in", "zero"))
    assert {"join", "join_copies"} <= set(done[last:])


def test_the_annex_is_gone_before_the_first_page_is(
    make: Make, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = make(backend)
    drop, found = both.annex.drop, list[int]()

    def look_and_drop() -> None:
        found.append(both.ours.image.num_resident_pages)
        drop()

    monkeypatch.setattr(both.annex, "drop", look_and_drop)
    both.weights.hold(0)
    assert found == [NUM_PAGES]
    both.check(0)


def test_where_nobody_can_look_at_it_the_annex_stays_and_weights_go(
    make: Make, backend: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    both = make(backend)

    def full(_span: Any, **_: Any) -> Any:
        raise torch.OutOfMemoryError

    both.annex.prepare()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "any", full)
        both.weights.hold(NUM_PAGES)
    assert "buffers and graphs stay on the device: look at pages failed" in caplog.text
    assert both.annex.is_there
    assert both.ours.image.num_resident_pages == NUM_PAGES - NUM_ANNEX_PAGES
    both.weights.hold(NUM_WITH)
    both.check(NUM_WITH)


def test_what_the_annex_gets_later_counts_and_goes_with_it(make: Make, backend: Backend) -> None:
    both = make(backend)
    both.annex.take(2 * PAGE, Tenant())
    status = both.weights.status()
    assert (status.num_pages, status.num_resident_pages) == (NUM_WITH + 2, NUM_WITH + 2)
    both.weights.hold(NUM_WITH + 2)
    assert both.ours.view().weights_bytes == (NUM_WITH + 2) * PAGE
    both.weights.hold(NUM_PAGES)
    both.check(NUM_PAGES)
    both.weights.hold(NUM_WITH + 2)
    assert both.annex.resident_bytes == (NUM_ANNEX_PAGES + 2) * PAGE
    assert both.ours.view().weights_bytes == (NUM_WITH + 2) * PAGE


def test_nothing_runs_on_the_annex_any_more_when_it_goes(make: Make, backend: Backend) -> None:
    both = make(backend)
    both.weights.hold(NUM_PAGES)
    done = both.ours.done
    assert done.index("fence") < done.index("copy_out") < done.index("unmap")


def test_what_torch_keeps_for_later_goes_with_the_annex(
    make: Make, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = make(backend)
    done = both.ours.done
    monkeypatch.setattr(rank, "release_cached_blocks", lambda: done.append("release"))
    both.weights.hold(NUM_PAGES)
    assert done[-2:] == ["release", "settle"]


def test_without_host_memory_for_it_the_annex_stays_and_weights_go(
    make: Make, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    both = make(backend)
    both.is_host_full = True
    with caplog.at_level(logging.WARNING):
        both.weights.hold(NUM_PAGES)
    assert "buffers and graphs stay on the device: the host is full" in caplog.text
    assert both.annex.is_there
    assert both.ours.image.num_resident_pages == NUM_PAGES - NUM_ANNEX_PAGES
    both.weights.hold(NUM_WITH)
    both.check(NUM_WITH)
    # An engine that keeps more than was wanted would offer nothing any more.
    assert both.weights.hold(NUM_WITH - 1).num_resident_pages < NUM_WITH
    assert both.ours.image.num_resident_pages == NUM_PAGES - 1
    assert both.ours.view().weights_bytes == (NUM_WITH - 1) * PAGE
    assert both.weights.hold(2).num_resident_pages == 2
    assert both.annex.is_there
    both.weights.hold(NUM_WITH)
    both.check(NUM_WITH)


@pytest.mark.parametrize("verb", ["unmap", "zero"])
def test_what_a_backend_that_failed_has_left_goes_when_less_is_wanted(
    make: Make, verb: str
) -> None:
    failing = set[str]()
    both = make(FaultyBackend(HostBackend(PAGE), lambda called, _: called in failing))
    for words in both.words:
        words.zero_()
    if verb == "zero":
        both.weights.hold(NUM_PAGES)
    failing.add(verb)
    with suppress(BackendError):
        both.weights.hold(NUM_PAGES if verb == "unmap" else NUM_WITH)
    assert not both.annex.is_there
    assert both.annex.resident_bytes
    failing.clear()
    assert both.weights.hold(NUM_PAGES).num_resident_pages == NUM_PAGES
    assert both.annex.resident_bytes == 0


def test_memory_that_others_took_is_waited_for(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rank_row, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.0)
    backend = LimitedBackend(HostBackend(PAGE), NUM_WITH * PAGE)
    both = make(backend)
    both.weights.hold(0)
    backend.limit_bytes = (NUM_WITH - 1) * PAGE
    with caplog.at_level(logging.WARNING):
        both.weights.hold(NUM_WITH)
    both.check(NUM_PAGES)
    assert both.weights.status().num_missing_pages == NUM_ANNEX_PAGES
    backend.limit_bytes = NUM_WITH * PAGE
    both.weights.hold(NUM_WITH)
    both.check(NUM_WITH)
