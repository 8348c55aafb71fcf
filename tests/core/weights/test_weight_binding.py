"""A model's weights move to memory of ours with everybody who uses them, or stay where they are."""

import gc
import logging
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.forked import exit_code_of_child
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import MIB
from kvcached_core.weights import binding as binding_module
from kvcached_core.weights.binding import Binding, Group, bind, collect

ALIGNMENT_BYTES = 512


class Memory:
    """A mapped range that gives out pieces, and can be dropped."""

    def __init__(self, num_bytes: int = 8 * MIB) -> None:
        self.backend = HostBackend()
        self.address = self.backend.reserve(num_bytes)
        self.num_bytes = num_bytes
        self.handle: Any = self.backend.create(num_bytes)
        self.backend.map(self.address, self.handle)
        self.places: dict[str, int] = {}
        self._end = self.address

    def place(self, name: str, num_bytes: int) -> Any:
        if name not in self.places:
            self.places[name] = self._end
            self._end += -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return self.backend.tensor(self.places[name], num_bytes)

    def holds(self, tensor: Any) -> bool:
        return 0 <= tensor.data_ptr() - self.address < self.num_bytes

    def drop(self) -> None:
        if self.handle is not None:
            self.backend.unmap(self.address, self.handle)
            self.handle = None


class Model(torch.nn.Module):
    """An embedding that the head shares, two layers, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(64, 32)
        self.first = torch.nn.Linear(32, 32)
        self.second = torch.nn.Linear(32, 32, bias=False)
        self.head = torch.nn.Linear(32, 64, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, ids: Any) -> Any:
        hidden = self.second(torch.relu(self.first(self.embedding(ids)))) * self.scale
        return self.head(hidden)


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.drop()


def run(model: Any) -> Any:
    with torch.inference_mode():
        return model(torch.arange(8))


def bound(model: torch.nn.Module, memory: Memory) -> Binding:
    return bind(collect({"model": model}), memory.place)


def test_a_model_gives_the_same_answer_from_our_memory(memory: Memory) -> None:
    model = Model()
    before = run(model)
    binding = bound(model, memory)
    assert torch.equal(run(model), before)
    assert all(memory.holds(one) for one in model.parameters())
    assert not memory.holds(model.scale)
    assert binding.static == {}
    assert binding.bound_bytes == sum(one.nbytes for one in model.parameters())


def test_storages_keep_their_order_their_names_and_their_exact_sizes(memory: Memory) -> None:
    model = Model()
    groups = collect({"model": model})
    expected = {
        "model.embedding.weight": 64 * 32 * 4,
        "model.first.weight": 32 * 32 * 4,
        "model.first.bias": 32 * 4,
        "model.second.weight": 32 * 32 * 4,
    }
    assert {one.name: one.num_bytes for one in groups} == expected
    bind(groups, memory.place)
    assert list(memory.places) == list(expected)
    assert model.first.bias.untyped_storage().nbytes() == 32 * 4


def test_tied_weights_move_once_and_stay_tied(memory: Memory) -> None:
    model = Model()
    bound(model, memory)
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()


def test_several_models_are_bound_in_their_order(memory: Memory) -> None:
    target, drafter = Model(), Model()
    drafter.embedding.weight = drafter.head.weight = target.embedding.weight
    names = [one.name for one in collect({"target": target, "drafter": drafter})]
    assert len(names) == 4 + 3
    assert names[0] == "target.embedding.weight"
    assert names[4] == "drafter.first.weight"


def test_what_is_empty_or_elsewhere_is_left_out() -> None:
    model = Model()
    model.empty = torch.nn.Parameter(torch.empty(0))
    model.nowhere = torch.nn.Parameter(torch.empty(4, 4, device="meta"))
    assert len(collect({"model": model})) == 4
    assert collect({"model": torch.nn.Module()}) == []


class Kept:
    """What a layer calculated of its weights, kept beside them."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.calculated = torch.ones(shape, dtype=dtype)


def test_large_tensors_that_are_no_parameters_move_too(memory: Memory) -> None:
    model = Model()
    model.first.own = torch.ones(512, 512)
    model.first.kept = Kept(512, 512)
    model.first.listed = [torch.ones(512, 512), "no tensor"]
    model.first.small = torch.ones(16)
    model.first.scratch = Kept(2048, 2048, dtype=torch.uint8)
    model.first.lora_a_stacked = (torch.ones(512, 512),)
    model.first.workspace = Kept(512, 512)
    names = [one.name for one in collect({"model": model})]
    assert names[3:6] == [
        "model.first.own",
        "model.first.kept.calculated",
        "model.first.listed.0",
    ]
    assert len(names) == 4 + 3
    assert bound(model, memory).static == {}
    assert memory.holds(model.first.kept.calculated)


def attribute(weight: Any) -> tuple[Callable[[], Any], object]:
    kept = Kept(1)
    kept.calculated = weight.data.t()
    return lambda: kept.calculated, None


def closure(weight: Any) -> tuple[Callable[[], Any], object]:
    alias = weight.detach().view(-1)
    return lambda: alias, None


def listed(weight: Any) -> tuple[Callable[[], Any], object]:
    kept = {"all": [[weight.data[3:]]]}
    return lambda: kept["all"][0][0], kept


ALIASES = [attribute, closure, listed]


@pytest.mark.parametrize("hide", ALIASES)
def test_a_hidden_alias_moves_along(memory: Memory, hide: Callable[..., Any]) -> None:
    model = Model()
    alias, _kept = hide(model.second.weight)
    binding = bound(model, memory)
    assert binding.static == {}
    assert memory.holds(alias())
    with torch.inference_mode():
        model.second.weight.fill_(7)
    assert bool((alias() == 7).all())
    memory.drop()
    assert exit_code_of_child(lambda: alias().sum()) == -signal.SIGSEGV


@pytest.mark.parametrize("hide", ALIASES)
def test_an_alias_that_nobody_finds_keeps_its_weight_where_it_is(
    memory: Memory,
    hide: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model()
    alias, _kept = hide(model.second.weight)
    monkeypatch.setattr(binding_module, "tensors_over", only_the_models(model))
    with caplog.at_level(logging.WARNING, "kvcached"):
        binding = bound(model, memory)
    assert binding.static == {"model.second.weight": 32 * 32 * 4}
    assert "model.second.weight (4 KiB) stays" in caplog.text
    memory.drop()
    assert exit_code_of_child(lambda: (alias().sum(), model.second.weight.sum())) == 0


@pytest.mark.parametrize("hide", ALIASES)
def test_without_finder_and_watch_the_two_part_and_a_step_after_a_drop_dies(
    memory: Memory, hide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    alias, _kept = hide(model.second.weight)
    monkeypatch.setattr(binding_module, "tensors_over", only_the_models(model))
    monkeypatch.setattr(binding_module, "_is_in_use", lambda _watch: False)
    assert bound(model, memory).static == {}
    with torch.inference_mode():
        model.second.weight.fill_(7)
    assert not bool((alias() == 7).any())
    memory.drop()
    assert exit_code_of_child(lambda: alias() - model.second.weight.sum()) == -signal.SIGSEGV


def only_the_models(model: Any) -> Callable[[Any], dict[int, list[Any]]]:
    """Return a finder that is switched off: it knows parameters alone."""
    return lambda _keys: {one.key: list(one.tensors) for one in collect({"model": model})}


def test_what_only_autograd_holds_keeps_its_weight_where_it_is(memory: Memory) -> None:
    model = Model()
    before = run(model)
    wanted = torch.ones(1, 32, requires_grad=True)
    product = torch.nn.functional.linear(wanted, model.second.weight.detach())  # it keeps a view
    binding = bound(model, memory)
    assert binding.static == {"model.second.weight": 32 * 32 * 4}
    assert not memory.holds(model.second.weight)
    assert torch.equal(run(model), before)
    del product


def test_inference_tensors_can_be_bound(memory: Memory) -> None:
    with torch.inference_mode():
        model = Model()
        before = model(torch.arange(8))
    assert bound(model, memory).static == {}
    assert torch.equal(run(model), before)


def test_frozen_objects_are_found(memory: Memory) -> None:
    model = Model()
    alias, _kept = attribute(model.second.weight)
    gc.freeze()
    try:
        assert bound(model, memory).static == {}
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
    assert memory.holds(alias())


def test_a_parameter_that_the_engine_replaced_is_told_and_bound_again(memory: Memory) -> None:
    model = Model()
    binding = bound(model, memory)
    modules = {"model": model}
    assert binding.moved(modules) == []
    model.second.weight = torch.nn.Parameter(torch.full((32, 32), 3.0))
    with torch.inference_mode():
        model.first.weight.fill_(2)  # in its place: that is no move
    assert [one.name for one in binding.moved(modules)] == ["model.second.weight"]
    after = run(model)
    again = binding.bind_again(modules, memory.place)
    assert list(again.bound) == ["model.second.weight"]
    assert memory.holds(model.second.weight)
    assert binding.moved(modules) == []
    assert torch.equal(run(model), after)


def test_what_has_no_place_of_its_size_stays_where_it_is(memory: Memory) -> None:
    model = Model()
    binding = bound(model, memory)
    model.second.weight = torch.nn.Parameter(torch.ones(16, 32))
    model.added = torch.nn.Linear(4, 4, bias=False)
    again = binding.bind_again({"model": model}, memory.place)
    expected = {"model.second.weight": 16 * 32 * 4, "model.added.weight": 4 * 4 * 4}
    assert (again.bound, again.static) == ({}, expected)
    assert binding.moved({"model": model}) == []
    assert binding.static_bytes == sum(expected.values())


def test_a_place_that_somebody_still_uses_is_not_given_away(memory: Memory) -> None:
    model = Model()
    binding = bound(model, memory)
    kept = model.second.weight
    values = kept.detach().clone()
    model.second.weight = torch.nn.Parameter(torch.ones(32, 32))
    again = binding.bind_again({"model": model}, memory.place)
    assert list(again.static) == ["model.second.weight"]
    assert torch.equal(kept, values)


def test_a_buffer_in_an_attribute_stays(memory: Memory) -> None:
    model = Model()
    model.register_buffer("table", torch.ones(512, 512))
    model.alias = model.table
    bound(model, memory)
    assert not memory.holds(model.alias)


@settings(deadline=None, max_examples=10)  # each looks through all objects of the process
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
def test_views_of_any_shape_keep_their_values(shapes: list[tuple[int, int]]) -> None:
    memory = Memory(2 * MIB)
    model = torch.nn.Module()
    views = []
    for index, (rows, columns) in enumerate(shapes):
        weight = torch.randn(rows, columns)
        setattr(model, f"weight_{index}", torch.nn.Parameter(weight.t()))
        views.append((weight, weight.clone()))
    groups: list[Group] = collect({"model": model})
    bind(groups, memory.place)
    for weight, copy in views:
        assert memory.holds(weight)
        assert torch.equal(weight, copy)
    memory.drop()
