"""Who keeps the address of a weight as a number is found by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvcached_core.weights.addresses import who_keeps_addresses
from kvcached_core.weights.binding import collect


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)
        self.layer.num_experts = 8
        self.layer.rows = torch.arange(64)


def number(model: Any) -> str:
    model.layer.start = model.layer.weight.data_ptr()
    return "model.layer.start"


def inside(model: Any) -> str:
    model.last_row = model.layer.weight[7].data_ptr()
    return "model.last_row"


def table(model: Any) -> str:
    pointers = [model.layer.bias.data_ptr(), 0]
    model.layer.register_buffer("pointers", torch.tensor(pointers, dtype=torch.int64))
    return "model.layer.pointers"


@pytest.mark.parametrize("keep", [number, inside, table])
def test_an_address_that_is_kept_is_found(keep: Callable[[Any], str]) -> None:
    model = Model()
    name = keep(model)
    assert who_keeps_addresses({"model": model}, collect({"model": model})) == name


def test_other_numbers_are_no_addresses() -> None:
    model = Model()
    model.layer.behind = max(
        one.data_ptr() + one.untyped_storage().nbytes() for one in model.parameters()
    )
    model.layer.empty = torch.empty(0, dtype=torch.int64)
    assert who_keeps_addresses({"model": model}, collect({"model": model})) is None
