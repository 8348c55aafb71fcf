"""Large buffers of a runner move to the annex with everybody who uses them, or stay."""

import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import KIB
from kvcached_core.weights import scratch as scratch_module
from kvcached_core.weights.annex import Annex
from kvcached_core.weights.scratch import Scratch, find_scratch

UNIT = 64 * KIB
CPU = torch.device("cpu")
HERE = (__name__,)


class State:
    """A part of a runner, of the engine's own code."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class Slotted:
    """One that keeps its buffer in a slot."""

    __slots__ = ("buffer",)

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(256, 256)
        self.register_buffer("table", full(5))


@pytest.fixture(autouse=True)
def least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch_module, "LEAST_SCRATCH_BYTES", UNIT)


@pytest.fixture
def annex() -> Iterator[Annex]:
    kept: list[Any] = []

    def room(num_bytes: int) -> int:
        kept.append((ctypes.c_int8 * num_bytes)())
        return ctypes.addressof(kept[-1])

    made = Annex(HostBackend(UNIT), room)
    yield made
    made.close()


def full(number: int, num_bytes: int = UNIT) -> torch.Tensor:
    return torch.full((num_bytes // 4,), number, dtype=torch.int32)


def names(root: Any, packages: tuple[str, ...] = HERE) -> list[str]:
    return sorted(group.name for group in find_scratch({"runner": root}, packages, CPU))


def test_buffers_are_found_wherever_the_engine_keeps_them() -> None:
    inner = State(counts=full(1), words=[full(2), {"masks": full(3)}])
    found = names(State(state=inner, slotted=Slotted(full(4)), model=Model()))
    assert found == [
        "runner.model._buffers.table",
        "runner.slotted.buffer",
        "runner.state.counts",
        "runner.state.words.0",
        "runner.state.words.1.masks",
    ]


def test_a_buffer_that_a_module_keeps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "_kept", {("cpu", 1): full(1)}, raising=False)
    assert names(State()) == [f"{__name__}._kept.('cpu', 1)"]


def test_what_is_small_or_a_weight_or_elsewhere_stays() -> None:
    small, meta = full(1, UNIT - 4), torch.empty(UNIT, device="meta")
    assert names(State(small=small, meta=meta, layer=torch.nn.Linear(256, 256))) == []


def test_what_a_compiler_traces_with_is_passed() -> None:
    with FakeTensorMode():
        table, buffer = torch.zeros(4, dtype=torch.int64), torch.zeros(UNIT)
    assert (table.device, buffer.device) == (CPU, CPU)
    assert names(State(table=table, buffer=buffer, real=full(1))) == ["runner.real"]


def test_nothing_is_looked_for_in_what_is_not_the_engines() -> None:
    assert names(State(counts=full(1)), ("somewhere.else",)) == []
    assert names(State(counts=full(1)), (__name__[:-1],)) == []


def test_memory_that_others_see_stays() -> None:
    shared = full(1)
    array = shared.numpy()
    theirs = torch.frombuffer((ctypes.c_int8 * UNIT)(), dtype=torch.int8)
    assert names(State(shared=shared, theirs=theirs)) == []
    assert array[0] == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
def test_a_buffer_whose_address_stands_in_a_table_stays(dtype: torch.dtype) -> None:
    named, other = full(1), full(2)
    table = torch.tensor([7, named.data_ptr() + 16], dtype=torch.int64).view(dtype)
    assert names(State(named=named, other=other)) == ["runner.other"]
    del table
    assert names(State(named=named, other=other)) == ["runner.named", "runner.other"]


def test_a_buffer_whose_address_is_an_attribute_stays() -> None:
    named = full(1)
    assert names(State(named=named, keeper=State(address=named.data_ptr()))) == []


def test_buffers_come_back_for_all_who_use_them(annex: Annex) -> None:
    first, second = full(1), full(2, 2 * UNIT)
    view = second[5:9]
    runner = State(first=first, parts=(second, view))
    scratch = Scratch(annex)
    assert scratch.move(find_scratch({"runner": runner}, HERE, CPU)) == 3 * UNIT
    second[6] = 77
    annex.drop()
    assert annex.resident_bytes == 0
    annex.bring()
    assert first.eq(1).all()
    assert view.tolist() == [2, 77, 2, 2]
    assert annex.num_bytes == 3 * UNIT


def test_what_is_forgotten_comes_back_as_zeros_and_takes_no_host_memory(annex: Annex) -> None:
    runner = State(penalties=State(counts=full(1)), table=full(2))
    asked = list[int]()
    room = annex._room
    annex._room = lambda num_bytes: asked.append(num_bytes) or room(num_bytes)  # type: ignore[func-returns-value]
    groups = find_scratch({"runner": runner}, HERE, CPU)
    assert Scratch(annex).move(groups, ("counts",)) == 2 * UNIT
    annex.drop()
    annex.bring()
    assert asked == [UNIT]
    assert not runner.penalties.counts.any()
    assert runner.table.eq(2).all()


def test_a_buffer_that_the_engine_has_replaced_does_not_come_back(annex: Annex) -> None:
    runner = State(first=full(1), second=full(2))
    Scratch(annex).move(find_scratch({"runner": runner}, HERE, CPU))
    runner.first = None
    annex.drop()
    assert annex.num_bytes == UNIT
    annex.bring()
    assert runner.second.eq(2).all()


def test_a_buffer_that_somebody_unknown_uses_stays(annex: Annex) -> None:
    hidden = full(1)
    storage = hidden.untyped_storage()  # what C++ keeps looks like this
    runner = State(hidden=hidden, other=full(2))
    address = hidden.data_ptr()
    assert Scratch(annex).move(find_scratch({"runner": runner}, HERE, CPU)) == UNIT
    assert hidden.data_ptr() == storage.data_ptr() == address
    annex.drop()
    assert hidden.eq(1).all()
    assert annex.num_bytes == UNIT  # the place that it did not take is given back
