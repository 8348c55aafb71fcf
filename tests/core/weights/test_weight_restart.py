"""A start has its weights from the copy of an earlier one, or else it reads the files."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.waiting import await_that

from kvcached_core.config import Config
from kvcached_core.weights.key import FileMark, Origin
from kvcached_core.weights.own_weights import OwnWeights, take_over
from kvcached_core.weights.restart import Restart, make_restart

CPU = torch.device("cpu")
SIZE = 768


class Model(torch.nn.Module):
    """Two layers and a head on pages of 2 MiB, a table, a scale, and a number made from it."""

    def __init__(self, *, is_read: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1 if is_read else 2)
        layers = [torch.nn.Linear(SIZE, SIZE, bias=True) for _ in range(2)]
        self.layers = torch.nn.ModuleList(layers)
        self.head = torch.nn.Linear(SIZE, SIZE)  # behind the layers, and in front of them in images
        self.register_buffer("table", torch.arange(5))
        self.register_buffer("scale", torch.rand(1, generator=generator))
        self.register_buffer("kv_cache", torch.rand(3, generator=generator))
        self.factor = 0.5
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator))

    def forward(self, inputs: Any) -> Any:
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs) * self.scale * self.factor / SIZE)
        return self.head(inputs)


class Start:
    """One start of an engine, as far as it loads its model."""

    def __init__(self, folder: Path, mark: int = 0, **settings: Any) -> None:
        self.config = Config(dir=folder, weights_dir=folder / "w", **settings)
        self.origin = Origin("m", "f32", "test", "cpu", "", files=(FileMark("a", 9, mark),))
        self.num_read = self.num_undone = self.num_looks = 0
        self.make_up: Callable[[], Model] = lambda: Model(is_read=False)
        self.owned: OwnWeights | None = None
        self.restart: Restart | None = None

    def origin_of(self, digest: str) -> Origin:
        origin = self.origin
        self.num_looks += 1
        return Origin(
            origin.model, origin.dtype, origin.engine, origin.device, digest, files=origin.files
        )

    def load(self) -> Model:
        """Load the model, as an engine's hook does, and take its weights over."""
        self.restart = make_restart(self.config, CPU, self.origin_of, ())
        model = self._read() if self.restart is None else self._load(self.restart)
        modules = {"model": model}
        self.owned = take_over(modules, CPU, self.config, self.origin_of, restart=self.restart)
        return model

    def _load(self, restart: Restart) -> Model:
        model = restart.load(self.make_up, self._read, self._undo)
        assert isinstance(model, Model)
        return model

    def copied(self) -> "Start":
        """Load, have a copy, and end."""
        model = self.load()
        self.wait()
        self.end(model)
        return self

    def wait(self) -> None:
        assert self.owned is not None
        rank = self.owned.rank
        rank.begin_copy()
        await_that(lambda: rank.status().is_copied)

    def end(self, model: Model) -> None:
        """Give everything back."""
        for layer in (*model.layers, model.head):
            layer.weight = layer.bias = None
        assert self.owned is not None
        self.owned.close()

    def _read(self) -> Model:
        self.num_read += 1
        return Model(is_read=True)

    def _undo(self) -> None:
        assert not self.num_read
        self.num_undone += 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return where a first start has left a copy."""
    Start(tmp_path).copied()
    return tmp_path


def answer(model: Model) -> Any:
    with torch.inference_mode():
        return model(torch.ones(1, SIZE))


def only(folder: Path, kind: str) -> Path:
    (found,) = (folder / "w").glob(f"*.{kind}")
    return found


def note(folder: Path, **changed: Any) -> None:
    """Change what the record says of the model as it was loaded."""
    record = only(folder, "json")
    words = json.loads(record.read_text())
    words["loaded"] |= changed
    record.write_text(json.dumps(words))


def test_the_first_start_reads_the_files(tmp_path: Path) -> None:
    assert Start(tmp_path).copied().num_read == 1


def test_the_next_start_has_the_same_weights_and_reads_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    second, inode = Start(folder), only(folder, "image").stat().st_ino
    with caplog.at_level(logging.INFO):
        model = second.load()
    assert (second.num_read, second.num_undone) == (0, 0)
    assert "weights of m are those of its host copy; no file was read" in caplog.text
    expected = Model(is_read=True)
    assert torch.equal(answer(model), answer(expected))
    assert model.scale.equal(expected.scale)
    second.wait()  # the copy is used on, and nothing is copied
    assert second.owned is not None
    assert second.owned.rank.hold(0).num_resident_pages == 0
    assert second.owned.rank.hold(1000).num_missing_pages == 0
    assert torch.equal(answer(model), answer(expected))
    second.end(model)
    assert only(folder, "image").stat().st_ino == inode
    third = Start(folder)
    assert torch.equal(answer(third.load()), answer(expected))
    assert third.num_read == 0


@pytest.mark.parametrize("settings", [{"weights_restart": False}, {"mark": 1}])
def test_a_start_that_may_not_or_whose_files_are_others_reads_them(
    folder: Path, settings: dict[str, Any]
) -> None:
    second = Start(folder, **settings)
    second.load()
    assert second.num_read == 1


def spoil_image(folder: Path) -> None:
    image = only(folder, "image")
    with image.open("r+b") as file:
        file.seek(SIZE)
        file.write(b"\x55")


def shorten_image(folder: Path) -> None:
    os.truncate(only(folder, "image"), 4096)


def spoil_piece(folder: Path) -> None:
    words = json.loads(only(folder, "json").read_text())["loaded"]
    note(folder, pieces=[words["pieces"][0] + 1, *words["pieces"][1:]])


def spoil_number(folder: Path) -> None:
    words = json.loads(only(folder, "json").read_text())["loaded"]
    note(folder, beside=words["beside"] | {"model.factor": "0.25"})


def spoil_table(folder: Path) -> None:
    beside = json.loads(only(folder, "json").read_text())["loaded"]["beside"]
    (name,) = (name for name in beside if name.endswith("table"))
    beside[name][1] = [6]
    note(folder, beside=beside)


def spoil_layout(folder: Path) -> None:
    note(folder, layout_digest="0" * 32)


def cut_record(folder: Path) -> None:
    record = only(folder, "json")
    record.write_text(record.read_text()[:-40])


SPOILERS = {
    spoil_image: "its bytes are not those that its record is of",
    shorten_image: "is filled again: it has 4096 bytes",
    spoil_piece: "not from the host copy: they are not what was loaded then",
    spoil_number: "not from the host copy: model.factor differs",
    spoil_table: "table differs",
    spoil_layout: "this model is laid out otherwise",
    cut_record: "cannot be read",
}


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_copy_in_doubt_is_refused_and_the_files_are_read(
    folder: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    spoil(folder)
    second = Start(folder)
    with caplog.at_level(logging.INFO):
        model = second.load()
        assert second.num_read == 1
        assert torch.equal(answer(model), answer(Model(is_read=True)))
        second.wait()
        second.end(model)
    assert SPOILERS[spoil] in caplog.text
    assert "no file was read" not in caplog.text


def test_a_model_that_cannot_be_made_up_is_read_and_nobody_tries_it_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Model:
        raise KeyError("no such layer")

    second = Start(folder)
    second.make_up = fail
    second.copied()
    assert (second.num_read, second.num_undone) == (1, 1)
    assert "not from the host copy: KeyError: 'no such layer'" in caplog.text
    third = Start(folder)
    third.load()
    assert (third.num_read, third.num_undone) == (1, 0)


def test_weights_that_were_updated_before_they_were_copied_are_not_those_of_the_files(
    tmp_path: Path,
) -> None:
    first = Start(tmp_path)
    model = first.load()
    with torch.no_grad():
        model.layers[0].weight.add_(1)
    first.wait()
    first.end(model)
    second = Start(tmp_path)
    assert torch.equal(answer(second.load()), answer(Model(is_read=True)))
    assert second.num_read == 1


def test_a_model_that_changes_between_loading_and_taking_over_is_read_each_time(
    tmp_path: Path,
) -> None:
    first = Start(tmp_path)
    restart = make_restart(first.config, CPU, first.origin_of, ())
    assert restart is not None
    model = restart.load(lambda: Model(is_read=False), lambda: Model(is_read=True), lambda: None)
    model.layers.append(torch.nn.Linear(SIZE, SIZE))  # type: ignore[operator,union-attr]
    assert restart.loaded_as(restart.loaded.layout_digest if restart.loaded else "") is not None
    first.owned = take_over({"model": model}, CPU, first.config, first.origin_of, restart=restart)
    first.wait()
    assert json.loads(only(tmp_path, "json").read_text())["loaded"] is None


def test_a_models_files_are_looked_at_once(folder: Path) -> None:
    second, third = Start(folder), Start(folder, mark=1)
    second.load()
    assert (second.num_read, second.num_looks) == (0, 1)
    third.load()  # other files, so it reads them
    assert (third.num_read, third.num_looks) == (1, 1)


def test_files_that_come_while_a_model_is_loaded_are_its_files(tmp_path: Path) -> None:
    first = Start(tmp_path)
    files, first.origin = first.origin.files, replace(first.origin, files=())
    restart = make_restart(first.config, CPU, first.origin_of, ())
    assert restart is not None

    def read() -> Model:
        first.origin = replace(first.origin, files=files)
        return Model(is_read=True)

    restart.load(lambda: Model(is_read=False), read, lambda: None)
    assert restart.loaded is not None
    assert restart.origin_of("layout").files == files


def test_nothing_is_noted_of_weights_without_files(tmp_path: Path) -> None:
    first = Start(tmp_path)
    first.origin = replace(first.origin, files=())
    first.copied()
    assert first.restart is not None
    assert first.restart.loaded is None
    assert json.loads(only(tmp_path, "json").read_text())["loaded"] is None
