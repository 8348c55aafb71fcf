"""What a worker of Ray's hands on to the gateway and its engines."""

import stat
from pathlib import Path

import pytest

from kvcached_gateway.engines.state_file import Folder
from kvcached_ray import variables
from kvcached_ray.cluster import FOLDER
from kvcached_ray.variables import engine_variables, own_directory


def test_engines_get_the_variables_that_ray_was_started_with_and_none_of_its_workers() -> None:
    given = {
        "HF_TOKEN": "secret",
        "KVCACHED_WEIGHTS": "yield",
        "RAY_JOB_ID": "01",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    assert engine_variables(given) == {"HF_TOKEN": "secret", "KVCACHED_WEIGHTS": "yield"}


def test_the_folder_of_a_node_is_the_one_that_ray_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = tmp_path / "usual"
    monkeypatch.setattr(variables, "default_directory", lambda: usual)
    assert own_directory({"KVCACHED_DIR": str(tmp_path / "one")}) == tmp_path / "one"
    assert own_directory({}) == own_directory({"KVCACHED_DIR": ""}) == usual


def test_on_a_new_machine_the_folder_is_made_for_its_user_alone(tmp_path: Path) -> None:
    own = tmp_path / "kv"
    for _ in range(2):  # the cluster's part of the head node, and its node, in any order
        with Folder(own_directory({"KVCACHED_DIR": str(own)}) / FOLDER):
            assert stat.S_IMODE(own.stat().st_mode) == 0o700
