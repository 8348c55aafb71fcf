"""Two ranks of one engine: the same pages on both, one promise for both, the same tokens."""

from pathlib import Path

import pytest
from helpers.engines import Offline, finish

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Each rank's threads get a core; the engine reads the bars as "and on the next rank".
CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def test_tensor_parallel_ranks_map_the_same_pages_and_answer_as_vanilla(
    start_offline: Offline, tmp_path: Path
) -> None:
    environ = {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_DIR": str(tmp_path / "kv"),
        "KVCACHED_HOST_POOL": "512MiB",
        "KVCACHED_DEBUG": "1",
    }
    started = [
        start_offline(CORES | {"ENABLE_KVCACHED": "0"}, "two_ranks"),
        start_offline(CORES | environ, "two_ranks"),
    ]
    vanilla, ours = map(finish, started)
    assert (vanilla.returncode, ours.returncode) == (0, 0), ours.errors[-4000:]
    report = ours.report
    assert report["tokens"] == vanilla.report["tokens"]
    first, second = report["pages"]
    assert first == second
    assert len(first) <= 2
    (view,) = report["view"]
    assert view["resident_bytes"] == 2 * len(first) * report["page_bytes"]
    assert view["promised_bytes"] == 0
    assert "Traceback" not in ours.errors


def test_tensor_parallel_ranks_give_their_weights_and_have_them_back_alike(
    start_offline: Offline, tmp_path: Path
) -> None:
    environ = {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_DIR": str(tmp_path / "kv"),
        "KVCACHED_HOST_POOL": "512MiB",
        "KVCACHED_WEIGHTS": "yield",
    }
    run = finish(start_offline(CORES | environ, "two_ranks"))
    assert run.returncode == 0, run.errors[-4000:]
    report = run.report
    assert report["asleep_pages"] == [0, 0]
    assert min(report["awake_pages"]) > 1
    assert report["tokens_after_sleep"] == report["tokens"]
    (view,) = report["view"]
    assert view["weights_bytes"] == view["weights_needed_bytes"] > 0
