"""vLLM has its weights from an earlier start's copy, in memory or on disk, if that is whole."""

from pathlib import Path
from typing import Any

import pytest
from helpers.engines import Offline, end_well, ours
from helpers.other_weights import move_to_disk, put_other_weights, spoil_copy

from kvcached_core.weights.moves import read_moves
from kvcached_demo.harness.model import make_model

NO_FILE = "are those of its host copy; no file was read"

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.every_release]


def test_a_restart_reads_no_weights_and_answers_the_same_unless_its_copy_is_spoiled(
    start_offline: Offline, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "llama", seed=1)
    environ = ours(
        tmp_path,
        KVCACHED_HOST_POOL="128MiB",
        KVCACHED_WEIGHTS="yield",
        KVCACHED_WEIGHTS_DISK=str(tmp_path / "disk"),
        KVCACHED_WEIGHTS_DISK_FREE="0",
        VLLM_LOGGING_LEVEL="INFO",  # as users have it: our lines are among vLLM's
    )

    def run() -> Any:
        run = end_well(start_offline(environ, "offline_restart", model=str(model)))
        return run.report["tokens"], run.output

    expected, said = run()
    assert NO_FILE not in said
    put_other_weights(model, make_model(tmp_path / "other", seed=2))
    tokens, said = run()
    assert tokens == expected
    assert NO_FILE in said
    move_to_disk(environ)
    tokens, said = run()
    assert tokens == expected
    assert NO_FILE in said
    assert read_moves(tmp_path / "disk").num_read == 1
    move_to_disk(environ)
    spoil_copy(tmp_path / "disk")
    tokens, said = run()
    assert tokens != expected  # what the files hold now
    assert NO_FILE not in said
    assert "pages are not those that its record is of" in said
