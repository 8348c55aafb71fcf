"""An adopted model lies in its image, in order, and answers the same from any copy of it."""

import ctypes
import logging
import signal
from typing import Any

import pytest
import torch
from helpers.forked import exit_code_of_child

from kvcached_core.errors import OutOfMemoryError
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import MIB
from kvcached_core.weights.adopting import Adopted, adopt


class Model(torch.nn.Module):
    """Layers of a MiB each: half of one lies in each page of 2 MiB, and half in the next."""

    def __init__(self, num_layers: int = 5) -> None:
        super().__init__()
        self.first = torch.nn.Linear(512, 768)
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(768, 768, bias=False) for _ in range(num_layers)
        )

    def forward(self, inputs: Any) -> Any:
        hidden = self.first(inputs)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return hidden


INPUTS = torch.ones(2, 512)


def answer(model: Any) -> Any:
    with torch.inference_mode():
        return model(INPUTS)


def adopted_of(model: Any) -> Adopted:
    adopted = adopt({"model": model}, HostBackend())
    assert adopted is not None
    return adopted


def test_the_answer_is_the_same_with_any_number_of_pages_dropped_and_restored() -> None:
    model = Model()
    before = answer(model)
    image = adopted_of(model).image
    assert torch.equal(answer(model), before)
    assert image.num_resident_pages == image.num_pages == 7
    copy = ctypes.string_at(image.page_address(0), image.num_pages * image.page_bytes)
    for num_kept in range(image.num_pages):
        image.drop_last(image.num_pages - num_kept)
        image.map_next(image.num_pages - num_kept)
        kept_bytes = num_kept * image.page_bytes
        ctypes.memmove(
            image.page_address(0) + kept_bytes, copy[kept_bytes:], len(copy) - kept_bytes
        )
        assert torch.equal(answer(model), before)
        assert not bool(torch.equal(answer(model), torch.zeros_like(before)))


def test_a_step_on_dropped_weights_ends_the_process() -> None:
    model = Model()
    adopted_of(model).image.drop_last(1)
    last_row = model.layers[-1].weight[-1]  # all of a layer would need threads, which a child lacks
    assert exit_code_of_child(last_row.sum) == -signal.SIGSEGV


def test_parameters_lie_in_the_models_order() -> None:
    model = Model(2)
    adopted_of(model)
    assert model.first.weight.data_ptr() < model.first.bias.data_ptr()
    assert model.first.bias.data_ptr() < model.layers[0].weight.data_ptr()
    assert model.layers[0].weight.data_ptr() < model.layers[1].weight.data_ptr()


def test_a_weight_that_the_engine_replaced_gets_its_place_again() -> None:
    model = Model(2)
    adopted = adopted_of(model)
    place = model.layers[1].weight.data_ptr()
    assert not adopted.follow()
    model.layers[1].weight = torch.nn.Parameter(torch.ones(768, 768))
    after = answer(model)
    assert adopted.follow()
    assert model.layers[1].weight.data_ptr() == place
    assert torch.equal(answer(model), after)


@pytest.mark.parametrize("has_none", [True, False], ids=["no weights", "a kept address"])
def test_why_nothing_is_adopted_is_said_in_one_line(
    has_none: bool,  # noqa: FBT001
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = torch.nn.Module() if has_none else Model(1)
    if not has_none:
        model.layers[0].start = model.layers[0].weight.data_ptr()
    with caplog.at_level(logging.WARNING, "kvcached"):
        assert adopt({"model": model}, HostBackend()) is None
    (line,) = caplog.messages
    assert line == "kvcached: elastic weights off: " + (
        "this model has none on its device"
        if has_none
        else "model.layers.0.start is the address of a weight"
    )


class SmallBackend(HostBackend):
    """Has memory for two pages."""

    num_left = 2

    def map(self, address: int, handle: Any) -> None:
        if not self.num_left:
            raise OutOfMemoryError("map", "ENOMEM", 2 * MIB)
        self.num_left -= 1
        super().map(address, handle)


def test_without_memory_for_the_image_the_start_ends() -> None:
    with pytest.raises(OutOfMemoryError):
        adopt({"model": Model()}, SmallBackend())
