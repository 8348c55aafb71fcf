"""Which pages each part of a model needs: what is outside of its layers lies in front of them."""

from typing import Any

import pytest
import torch
from torch import nn

from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import KIB
from kvcached_core.weights.adopting import adopt
from kvcached_core.weights.stages import Stages, find_layers, find_stages

PAGE = 4 * KIB
WORDS = PAGE // 4  # of a page


def linear(num_pages: int) -> nn.Linear:
    """Return one whose weight fills so many pages."""
    return nn.Linear(WORDS, num_pages, bias=False)


class Layer(nn.Module):
    def __init__(self, num_pages: int) -> None:
        super().__init__()
        self.attention = linear(1)
        self.experts = nn.ModuleList([linear(1) for _ in range(num_pages - 1)])


class Model(nn.Module):
    """Its layers stand in front of a norm and a head; a tower with few weights before them."""

    def __init__(self, sizes: tuple[int, ...] = (3, 2, 4)) -> None:
        super().__init__()
        self.tower = nn.ModuleList([linear(1), linear(1)])
        self.embedding = linear(1)
        self.layers = nn.ModuleList([Layer(size) for size in sizes])
        self.norm = linear(1)
        self.head = linear(2)


def adopted(model: nn.Module, **more: nn.Module) -> tuple[Any, Stages]:
    modules = {"model": model, **more}
    found = adopt(modules, HostBackend(PAGE))
    assert found is not None
    return found, find_stages(modules, found.image)


def test_what_is_outside_of_the_layers_comes_first_and_each_layer_ends_where_it_ends() -> None:
    model = Model()
    before = [one.detach().clone() for one in model.parameters()]
    found, stages = adopted(model)
    assert stages == Stages(6 + 9, 6, (9, 11, 15))
    assert all(one.equal(two) for one, two in zip(model.parameters(), before, strict=True))
    names = [piece.name for piece in found.image.layout.pieces]
    assert [name for name in names if ".layers." not in name] == names[:5]
    assert names[5:] == sorted(names[5:])  # of the layers the order is the model's
    found.image.close()


def test_a_tensor_of_two_layers_is_there_for_the_first_and_one_used_outside_for_all() -> None:
    model = Model()
    first, second, third = model.layers
    third.attention.weight = first.attention.weight
    second.attention.weight = model.head.weight
    found, stages = adopted(model)
    # 6 outside; 3 of the first; of the second and of the third one less.
    assert stages == Stages(6 + 3 + 1 + 3, 6, (9, 10, 13))
    found.image.close()


def test_a_drafter_is_outside_of_the_layers_of_its_model() -> None:
    found, stages = adopted(Model((5, 5)), drafter=Model((1, 1)))
    assert stages == Stages(6 + 6 + 2 + 10, 14, (19, 24))
    found.image.close()


def test_a_layer_that_is_elsewhere_needs_nothing() -> None:
    model = Model((2, 2, 2))
    model.layers[1] = nn.Identity()  # another rank of a pipeline has it
    found, stages = adopted(model)
    assert stages.ends == (8, 0, 10)
    assert stages.inside_layers([0, 2]).num_pages == (10, 10)
    assert stages.inside_layers([0, 2]).num_first_pages == 8
    assert stages.in_front_of_layers().num_pages == (8, 8, 10)
    found.image.close()


@pytest.mark.parametrize("modules", [{}, {"model": linear(1)}, {"model": nn.ModuleList()}])
def test_a_model_without_a_list_of_layers_has_none(modules: dict[str, nn.Module]) -> None:
    assert find_layers(modules) == []


def test_of_lists_in_each_other_the_outer_one_counts() -> None:
    model = Model()
    with torch.no_grad():
        assert find_layers({"model": model}) == list(model.layers)
    alone = nn.ModuleList([nn.ModuleList([linear(3)])])
    assert find_layers({"model": alone}) == list(alone)
