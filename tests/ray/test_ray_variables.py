"""What a worker of Ray's hands on to the gateway and its engines."""

from pathlib import Path

from kvcached_core.units import default_directory
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


def test_the_folder_of_a_node_is_the_one_that_ray_was_started_with() -> None:
    assert own_directory({"KVCACHED_DIR": "/folder/of/one"}) == Path("/folder/of/one")
    assert own_directory({}) == own_directory({"KVCACHED_DIR": ""}) == default_directory()
