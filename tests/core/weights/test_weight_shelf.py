"""Host memory for what goes with the weights: counted with all that is ours, and it may grow."""

import ctypes
from pathlib import Path

import pytest
from helpers.weight_pages import Pins

from kvcached_core.config import Config
from kvcached_core.errors import HostBudgetError
from kvcached_core.units import GIB
from kvcached_core.weights import shelf as shelf_module
from kvcached_core.weights.copies_folder import read_holders
from kvcached_core.weights.host_budget import HostBudget
from kvcached_core.weights.host_bytes import MAX_COPY_BYTES, HostBytes
from kvcached_core.weights.shelf import Shelf


@pytest.fixture
def budget(tmp_path: Path) -> HostBudget:
    config = Config(dir=tmp_path, weights_dir=tmp_path / "weights", host_budget=4 * MAX_COPY_BYTES)
    return HostBudget(config, GIB)


@pytest.fixture
def pins() -> Pins:
    return Pins()


def claimed(budget: HostBudget) -> list[int]:
    return [holder.num_bytes for holder in read_holders(budget.folder)]


def test_it_is_claimed_pinned_and_given_back(budget: HostBudget, pins: Pins) -> None:
    shelf = Shelf("llama's buffers", budget, pins)
    address = shelf.room(MAX_COPY_BYTES + 1)
    assert claimed(budget) == [2 * MAX_COPY_BYTES]
    assert pins.ranges == {address: 2 * MAX_COPY_BYTES}
    assert [holder.name for holder in read_holders(budget.folder)] == ["llama's buffers"]
    ctypes.memset(address, 1, 2 * MAX_COPY_BYTES)
    shelf.close()
    assert claimed(budget) == []
    assert pins.ranges == {}


def test_what_is_enough_stays_and_what_is_not_grows(budget: HostBudget, pins: Pins) -> None:
    shelf = Shelf("ours", budget, pins)
    first = shelf.room(MAX_COPY_BYTES)
    assert shelf.room(1) == shelf.room(0) == first
    shelf.room(2 * MAX_COPY_BYTES)
    assert claimed(budget) == [2 * MAX_COPY_BYTES]
    assert len(pins.ranges) == 1
    shelf.close()


def test_nothing_is_taken_for_nothing(budget: HostBudget, pins: Pins) -> None:
    assert Shelf("ours", budget, pins).room(0) == 0
    assert not budget.folder.exists()


def test_without_room_in_the_budget_it_is_refused(budget: HostBudget, pins: Pins) -> None:
    shelf = Shelf("ours", budget, pins)
    with pytest.raises(HostBudgetError, match="ours needs"):
        shelf.room(5 * MAX_COPY_BYTES)
    assert shelf.room(4 * MAX_COPY_BYTES) > 0
    shelf.close()


def test_without_memory_nothing_stays_claimed(
    budget: HostBudget, pins: Pins, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> HostBytes:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(shelf_module, "touched", fail)
    with pytest.raises(HostBudgetError, match="go with its weights: Cannot allocate memory"):
        Shelf("ours", budget, pins).room(MAX_COPY_BYTES)
    assert claimed(budget) == []
