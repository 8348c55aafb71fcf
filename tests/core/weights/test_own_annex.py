"""A worker's annex: there where the settings say so, with host memory that counts in the budget."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.forked import exit_code_of_child

from kvcached_core.config import Config
from kvcached_core.units import MIB
from kvcached_core.weights import scratch
from kvcached_core.weights.copies_folder import read_holders
from kvcached_core.weights.host_bytes import MAX_COPY_BYTES
from kvcached_core.weights.own_annex import OwnAnnex, make_annex

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "LEAST_SCRATCH_BYTES", MIB)


def settings(folder: Path, **others: Any) -> Config:
    return Config(dir=folder, buffers="yield", host_budget=4 * MAX_COPY_BYTES, **others)


def made(config: Config) -> OwnAnnex:
    annex = make_annex(CPU, config, "models/llama")
    assert annex is not None
    return annex


def runner() -> Any:
    return SimpleNamespace(
        table=torch.ones(MIB // 4), counts=torch.zeros(MIB // 2), small=torch.ones(3)
    )


def test_buffers_stay_unless_the_settings_say_otherwise(tmp_path: Path) -> None:
    assert make_annex(CPU, Config(dir=tmp_path), "models/llama") is None


@pytest.mark.parametrize(
    ("allocator", "stays"),
    [
        ({}, False),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:True"}, True),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:true"}, True),
        (
            {
                "PYTORCH_ALLOC_CONF": "max_split_size_mb:64",
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            },
            False,
        ),
    ],
)
def test_on_a_gpu_buffers_stay_where_torch_takes_no_memory_of_others(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    allocator: dict[str, str],
    *,
    stays: bool,
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in allocator.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("kvcached_core.weights.own_annex.OwnAnnex", lambda *_: "an annex")
    annex = make_annex(torch.device("cuda"), settings(tmp_path), "models/llama")
    assert annex == (None if stays else "an annex")
    assert caplog.text.count("remove expandable_segments from PYTORCH_ALLOC_CONF") == stays


def test_on_a_host_there_are_no_graphs(tmp_path: Path) -> None:
    assert made(settings(tmp_path)).graph_pool is None


def test_buffers_move_and_what_is_kept_of_them_is_claimed_ahead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours, engine = made(settings(tmp_path)), runner()
    ours.move(vars(engine), ())
    assert ours.annex.num_bytes == 4 * MIB
    with caplog.at_level(logging.INFO):
        ours.prepare()
    assert "4 MiB of buffers and 0 B of CUDA graphs go with the weights" in caplog.text
    held = read_holders(tmp_path / "weights")
    assert [(one.name, one.num_bytes) for one in held] == [("llama's buffers", MAX_COPY_BYTES)]
    ours.annex.drop()
    ours.annex.bring()
    assert engine.table.eq(1).all()
    assert not engine.counts.any()
    ours.close()
    assert read_holders(tmp_path / "weights") == []


def test_once_graphs_are_captured_buffers_stay(tmp_path: Path) -> None:
    ours, engine = made(settings(tmp_path)), runner()
    ours._pool = SimpleNamespace(memory=SimpleNamespace(num_bytes=1))  # type: ignore[assignment]
    ours.move(vars(engine), ())
    assert ours.annex.num_bytes == 0
    ours.close()


def test_without_room_in_the_budget_it_says_so_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(dir=tmp_path, buffers="yield", host_budget=MIB)
    ours, engine = made(config), runner()
    ours.move(vars(engine), ())
    with caplog.at_level(logging.WARNING):
        ours.prepare()
    assert "buffers and graphs may have to stay: llama's buffers needs 16 MiB" in caplog.text
    assert ours.annex.is_there
    ours.close()


def test_a_forked_child_gives_nothing_back(tmp_path: Path) -> None:
    ours, engine = made(settings(tmp_path)), runner()
    ours.move(vars(engine), ())
    ours.prepare()

    def close() -> None:
        ours.close()
        assert ours.annex.num_bytes == 4 * MIB

    assert exit_code_of_child(close) == 0
    assert engine.table.eq(1).all()
    assert len(read_holders(tmp_path / "weights")) == 1
    ours.close()
