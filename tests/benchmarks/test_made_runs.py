"""What a run is made of, before anything starts."""

from pathlib import Path
from typing import Any

import pytest
from multi_model import options as command_line
from multi_model import run as running
from multi_model.client import Record, read_records
from multi_model.errors import ModeError
from multi_model.fleet import Fleet
from multi_model.model_files import shape_bytes
from multi_model.replays import kept_if_cut_off
from multi_model.run import Run, make_runs
from multi_model.settings import Folder
from multi_model.workloads import Workload
from parts.gateway_serve import ENGINE_BYTES
from rich.progress import Progress

from kvcached_core.units import GIB


class Card:
    """What stands for the GPU."""

    total_bytes = 140 * GIB


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "Gpu", Card)


def made(folder: Path, *words: str) -> Run:
    all_words = ["--profile", "gpu", "--out", str(folder / "run"), *words]
    options = command_line.parser("").parse_args(all_words)
    (run,) = make_runs(options, Folder(options.out), folder)
    return run


SHAPES = ("--shape", "llama-1b", "llama-8b", "--num-models", "3", "--cap-gib", "74.5")
SHORT = ("--workloads", "serverless:1", "--seconds", "60")


def test_shapes_take_turns_through_the_models_and_files_have_their_sizes(tmp_path: Path) -> None:
    run = made(tmp_path, *SHAPES, *SHORT)
    sizes = [
        sum(file.stat().st_size for file in model.glob("*.safetensors")) for model in run.models
    ]
    wanted = [shape_bytes(shape) for shape in ("llama-1b", "llama-8b", "llama-1b")]
    assert sizes == pytest.approx(wanted, rel=1e-6)
    assert wanted[0] < wanted[1] / 5


def test_the_folder_keeps_what_a_split_would_need(tmp_path: Path) -> None:
    made(tmp_path, *SHAPES, *SHORT)
    text = (tmp_path / "run" / "run.json").read_text()
    assert str(shape_bytes("llama-8b")) in text
    assert f'"card_bytes": {int(74.5 * GIB)}' in text


def test_several_shapes_are_refused_with_an_engine_that_counts_in_tokens(tmp_path: Path) -> None:
    with pytest.raises(ModeError, match="several shapes"):
        made(tmp_path, *SHAPES, *SHORT, "--engines", "vllm", "sglang")


def test_alone_has_a_server_of_each_shape_with_the_models_of_that_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[list[Path], list[int]]] = []

    class Alone(Fleet):
        """A server that is not started."""

        def _start_all(self) -> None:
            """Nothing runs here."""

    def play(
        fleet: Fleet, _workload: Workload, own: list[int], _bar: Progress, num_played: int | None
    ) -> list[Record]:
        assert num_played is None
        said.append((list(fleet.models), own))
        return [Record(model, 0.0, 1, 1) for model in own]

    monkeypatch.setattr(running, "Fleet", Alone)
    monkeypatch.setattr(running, "play_alone", play)
    run = made(tmp_path, *SHAPES, *SHORT)
    run.play("alone", Progress(disable=True))
    assert said == [([run.models[0]], [0, 2]), ([run.models[1]], [1])]


def test_the_gateway_is_told_the_memory_of_its_models_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multi_model import gateway_fleet

    monkeypatch.setattr("parts.gateway_serve.MEMORY", str(tmp_path))
    run = made(tmp_path, *SHAPES, *SHORT, "--modes", "gateway")
    fleet: Any = gateway_fleet.GatewayFleet(
        "gateway", run.members("gateway"), run.site, run.models, tmp_path / "fleet"
    )
    served = gateway_fleet.Served(fleet)
    try:
        found = served.settings({}, {})
    finally:
        served.close()
    copies = 2 * shape_bytes("llama-1b") + shape_bytes("llama-8b")
    assert int(found["host_memory"]) == pytest.approx(copies + 3 * ENGINE_BYTES)
    assert {each["env"]["KVCACHED_BUFFERS"] for each in found["environments"].values()} == {"yield"}


def test_a_replay_that_is_cut_off_keeps_the_requests_that_had_ended(tmp_path: Path) -> None:
    seen: list[Record] = []
    path = tmp_path / "ended.csv"

    def play() -> None:
        with kept_if_cut_off(path, seen.append) as note:
            note(Record(1, 2.0, 3, 4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play()
    assert read_records(path) == seen == [Record(1, 2.0, 3, 4)]


def test_one_that_ends_well_leaves_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "ended.csv"
    with kept_if_cut_off(path, lambda _record: None) as note:
        note(Record(1, 2.0, 3, 4))
    assert not path.exists()


def test_a_mode_that_is_run_twice_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ModeError, match="--upstream-python"):
        made(tmp_path, *SHAPES, *SHORT, "--twice", "upstream")
