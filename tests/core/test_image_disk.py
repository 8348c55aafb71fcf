"""What `doctor`, the metrics and JSON say of the disk that images of weights go to."""

import json
import os
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from helpers.commands import said
from helpers.weight_copies import KEY, LAYOUT, WHOLE_BYTES
from helpers.weight_pages import Pages
from prometheus_client.parser import text_string_to_metric_families

from kvcached_core.cli.image_disk import examine_image_disk
from kvcached_core.cli.metrics import exposition
from kvcached_core.config import Config, read_config
from kvcached_core.units import GIB
from kvcached_core.weights import direct_file
from kvcached_core.weights.budgets import make_budget
from kvcached_core.weights.open_copy import open_copy


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Settings of a disk on which one image lies, that came back once."""
    monkeypatch.setenv("KVCACHED_DIR", str(tmp_path / "kv"))
    monkeypatch.setenv("KVCACHED_WEIGHTS_DISK", str(tmp_path / "disk"))
    monkeypatch.setenv("KVCACHED_WEIGHTS_DISK_FREE", "0")
    monkeypatch.setenv("KVCACHED_HOST_BUDGET", str(WHOLE_BYTES))
    config = read_config()
    budget = make_budget(config, GIB)
    copy = open_copy(config, KEY, LAYOUT, budget)
    assert copy is not None
    assert copy.fill(Pages.of(1), Event())
    copy.close()
    budget.claim("qwen", 1).close()
    again = open_copy(config, KEY, LAYOUT, budget)
    assert again is not None
    again.close()
    return config


def test_doctor_says_room_o_direct_images_and_how_fast_they_came_back(config: Config) -> None:
    assert config.weights_disk is not None
    is_good, text = examine_image_disk(config.weights_disk, config)
    assert is_good
    for part in ("room for ", "O_DIRECT works", "1 images of 256 KiB", "1 came back at "):
        assert part in text
    assert "spoiled" not in text
    assert "image disk" in said("doctor")
    left = sorted(path.suffix for path in config.weights_disk.iterdir())
    assert left == ["", ".image", ".json", ".lock"]


def test_doctor_says_what_is_wrong(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = config.model_copy(update={"weights_disk_free": "100%"})
    is_good, text = examine_image_disk(tmp_path / "disk", full)
    assert not is_good
    assert "has no room above KVCACHED_WEIGHTS_DISK_FREE=100%" in text
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o755)
    is_good, text = examine_image_disk(tmp_path / "open", config)
    assert (is_good, "KVCACHED_WEIGHTS_DISK" in text) == (False, True)
    before = os.open

    def open_without(path: Any, flags: int, *more: Any, **words: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return before(path, flags, *more, **words)

    monkeypatch.setattr(direct_file.os, "open", open_without)
    assert "knows no O_DIRECT" in examine_image_disk(tmp_path / "disk", config)[1]


def test_a_folder_that_is_not_there_yet_is_made_by_the_first_image(
    config: Config, tmp_path: Path
) -> None:
    is_good, text = examine_image_disk(tmp_path / "later" / "disk", config)
    assert is_good
    assert "images of" not in text
    assert not (tmp_path / "later").exists()


def test_metrics_say_what_lies_there_and_what_moved(config: Config) -> None:
    found = {
        (sample.name, sample.labels.get("direction")): sample.value
        for family in text_string_to_metric_families(exposition(config.dir))
        for sample in family.samples
        if "weights_disk" in sample.name
    }
    assert found["kvcached_weights_disk_bytes", None] == WHOLE_BYTES
    assert found["kvcached_weights_disk_images", None] == 1
    for direction in ("out", "back"):
        assert found["kvcached_weights_disk_moves_total", direction] == 1
        assert found["kvcached_weights_disk_moved_bytes_total", direction] == WHOLE_BYTES
        assert found["kvcached_weights_disk_move_seconds_total", direction] > 0
    assert found["kvcached_weights_disk_spoiled_total", None] == 0


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize("command", ["list", "top"])
def test_as_json_the_images_and_moves_are_there(command: str) -> None:
    disk = json.loads(said(command, "--json"))["weights_disk"]
    assert disk["images"] == [{"name": "llama", "num_bytes": WHOLE_BYTES, "is_used": False}]
    assert disk["moves"]["num_read"] == 1


def test_without_a_disk_nothing_is_said_of_one(config: Config, monkeypatch: Any) -> None:
    monkeypatch.delenv("KVCACHED_WEIGHTS_DISK")
    assert "weights_disk" not in exposition(config.dir)
    assert json.loads(said("list", "--json"))["weights_disk"] is None
    assert "image disk" not in said("doctor")
