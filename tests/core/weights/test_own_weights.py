"""What was taken over is given and comes back, also when the engine has put other weights there."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.waiting import PATIENCE_SECONDS, await_that

from kvcached_core.config import read_config
from kvcached_core.errors import BackendError
from kvcached_core.weights import importing
from kvcached_core.weights.key import Origin
from kvcached_core.weights.own_weights import OwnWeights, take_over

CPU = torch.device("cpu")


class Model(torch.nn.Module):
    """Two layers on three pages of 2 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(768, 768, bias=False) for _ in range(2))

    def forward(self, inputs: Any) -> Any:
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs))
        return inputs


def take(model: Any, folder: Path, **settings: str) -> OwnWeights | None:
    folders = {"KVCACHED_DIR": str(folder), "KVCACHED_WEIGHTS_DIR": str(folder / "w")}
    config = read_config(folders | settings)
    return take_over(
        {"model": model}, CPU, config, lambda digest: Origin("m", "float32", "test", "cpu", digest)
    )


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def weights(model: Model, tmp_path: Path) -> Iterator[OwnWeights]:
    """The model's, with a copy on the host."""
    taken = take(model, tmp_path)
    assert taken is not None
    taken.rank.begin_copy()
    await_that(lambda: taken.rank.status().is_copied)
    yield taken
    for layer in model.layers:  # nothing may use the memory of ours any more
        layer.weight = None
    taken.rank.close()


def answer(model: Model) -> Any:
    with torch.inference_mode():
        return model(torch.ones(1, 768))


def go_and_come(weights: OwnWeights) -> None:
    assert weights.rank.hold(0).num_resident_pages == 0
    assert weights.rank.hold(weights.adopted.image.num_pages).num_missing_pages == 0


def test_a_model_answers_the_same_when_its_weights_have_gone_and_come(
    model: Model, weights: OwnWeights
) -> None:
    before = answer(model)
    assert weights.num_bytes == 6 << 20
    go_and_come(weights)
    assert torch.equal(answer(model), before)


def test_weights_that_were_written_or_replaced_come_back_as_they_were_then(
    model: Model, weights: OwnWeights
) -> None:
    before = answer(model)
    with torch.no_grad():
        model.layers[0].weight.mul_(2)
    model.layers[1].weight = torch.nn.Parameter(torch.rand(768, 768))
    after = answer(model)
    assert not torch.equal(after, before)
    weights.follow(is_update=True)
    go_and_come(weights)
    assert torch.equal(answer(model), after)


def test_a_close_that_fails_gives_the_annex_back_all_the_same(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = take(model, tmp_path)
    assert weights is not None
    closed = list[str]()
    weights.annex = SimpleNamespace(close=lambda: closed.append("annex"))  # type: ignore[assignment]
    close = weights.rank.close

    def fail() -> None:
        raise BackendError("unmap", "broken", 0)

    with monkeypatch.context() as patch:
        patch.setattr(weights.rank, "close", fail)
        with pytest.raises(BackendError):
            weights.close()
    assert closed == ["annex"]
    for layer in model.layers:
        layer.weight = None
    close()


def test_a_model_without_weights_is_left_alone(tmp_path: Path) -> None:
    assert take(torch.nn.Module(), tmp_path) is None


@pytest.mark.parametrize("is_asked", [False, True])
def test_weights_come_from_a_replica_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_asked: bool
) -> None:
    monkeypatch.setattr(importing, "ANSWER_SECONDS", PATIENCE_SECONDS)
    settings = {"KVCACHED_WEIGHTS_REPLICAS": "1"} if is_asked else {}
    models = [Model(), Model()]
    models[1].load_state_dict(models[0].state_dict())
    before = answer(models[0])
    owners = []
    for model in models:
        owned = take(model, tmp_path, **settings)
        assert owned is not None
        owners.append(owned)
        owned.rank.begin_copy()
        owned.rank.copying.join()
    ours = owners[0].rank
    ours.hold(0)
    assert ours.copying.copy is not None
    ctypes.memset(ours.copying.copy.page_address(0), 0, owners[0].num_bytes)
    ours.hold(owners[0].adopted.image.num_pages)
    assert torch.equal(answer(models[0]), before) is is_asked
    for model, owned in zip(models, owners, strict=True):
        for layer in model.layers:
            layer.weight = None
        owned.close()
