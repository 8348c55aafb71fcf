"""The key of a host copy: other weights have another, the same have the same on every start."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from kvcached_core.weights import key as weight_key
from kvcached_core.weights.key import FileMark, Origin, copy_key, mark_files

ORIGIN = Origin(
    model="/models/llama-8b",
    dtype="bfloat16",
    engine="vllm 0.32.0",
    device="cuda sm90",
    layout_digest="d1",
    files=(FileMark("model.safetensors", 100, 5),),
)


def test_the_key_of_the_same_weights_stays_the_same() -> None:
    # A copy outlives engines, so the key must not hang on a process; and no other copy is found if
    # it changes without a reason.
    assert copy_key(ORIGIN).digest == "4cb77d8f7aa6e211b5a8149e0a019cea"
    assert copy_key(replace(ORIGIN)) == copy_key(ORIGIN)


@pytest.mark.parametrize(
    "other",
    [
        {"model": "/models/llama-70b"},
        {"revision": "v2"},
        {"load_format": "dummy"},
        {"files": (FileMark("model.safetensors", 101, 5),)},
        {"files": (FileMark("model.safetensors", 100, 6),)},
        {"files": (FileMark("other.safetensors", 100, 5),)},
        {"files": ()},
        {"dtype": "float16"},
        {"quantization": "fp8"},
        {"part": "drafter"},
        {"tensor_parallel": (2, 0)},
        {"tensor_parallel": (2, 1)},
        {"pipeline_parallel": (2, 0)},
        {"pipeline_parallel": (2, 1)},
        {"engine": "vllm 0.33.0"},
        {"engine": "sglang 0.5.23"},
        {"device": "cuda sm80"},
        {"layout_digest": "d2"},
    ],
    ids=str,
)
def test_whatever_decides_the_bytes_makes_another_key(other: dict[str, object]) -> None:
    changed = replace(ORIGIN, **other)  # type: ignore[arg-type]
    assert copy_key(changed).digest != copy_key(ORIGIN).digest


def test_each_rank_has_a_key_of_its_own() -> None:
    ranks = [
        replace(ORIGIN, tensor_parallel=(2, rank), pipeline_parallel=(2, stage))
        for rank in range(2)
        for stage in range(2)
    ]
    assert len({copy_key(origin).digest for origin in ranks}) == 4
    assert {copy_key(origin).name for origin in ranks} == {
        f"llama-8b (rank {rank} of 4)" for rank in range(4)
    }


def test_a_seed_counts_only_where_weights_are_made_up() -> None:
    assert copy_key(replace(ORIGIN, seed=1)) == copy_key(ORIGIN)
    made_up = replace(ORIGIN, files=(), load_format="dummy")
    assert copy_key(replace(made_up, seed=1)) != copy_key(made_up)


def test_our_own_layout_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = copy_key(ORIGIN)
    monkeypatch.setattr(weight_key, "LAYOUT_VERSION", weight_key.LAYOUT_VERSION + 1)
    assert copy_key(ORIGIN).digest != before.digest


def test_a_model_of_a_hub_is_called_by_its_last_name() -> None:
    assert copy_key(replace(ORIGIN, model="meta-llama/Llama-3.1-8B")).name == "Llama-3.1-8B"


def test_files_are_marked_by_size_and_time_and_links_are_followed(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "snapshot", tmp_path / "blob"
    folder.mkdir()
    elsewhere.write_bytes(b"12345")
    os.utime(elsewhere, ns=(7, 7))
    (folder / "model.safetensors").symlink_to(elsewhere)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("not read by an engine")
    (folder / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    marks = mark_files(folder)
    assert [mark.name for mark in marks] == ["config.json", "model.safetensors"]
    assert marks[1] == FileMark("model.safetensors", 5, 7)


def test_one_file_is_marked_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"123")
    (mark,) = mark_files(tmp_path / "weights")
    assert (mark.name, mark.num_bytes) == ("weights", 3)


def test_a_model_without_files_here_has_none() -> None:
    assert mark_files(None) == ()
