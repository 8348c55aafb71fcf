"""A real engine whose layers differ in block size answers as vanilla does, from each class."""

from pathlib import Path
from typing import Any

import pytest
from helpers.engines import Offline, Started, finish, offline_in
from helpers.mixed_models import make_mixed_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.every_release]

# So small that requests are preempted: a page has 14 MiB.
POOL = "56MiB"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixed_model(tmp_path_factory.mktemp("models") / "tiny-nas", seed=1)


@pytest.fixture(scope="module")
def start(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Offline:
    return offline_in(tmp_path_factory.mktemp("mixed"), mixed)


def report_of(started: Started) -> Any:
    run = finish(started)
    assert run.returncode == 0, run.errors
    return run.report


def test_tokens_and_memory_of_layers_that_differ_in_block_size(
    start: Offline, tmp_path: Path
) -> None:
    environ = {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_DIR": str(tmp_path / "kv"),
        "KVCACHED_HOST_POOL": POOL,
        "KVCACHED_DEBUG": "1",
    }
    started = start({"ENABLE_KVCACHED": "0"}, "offline_mixed", caching=False)
    ours = report_of(start(environ, "offline_mixed", caching=True))
    theirs = report_of(started)
    page_bytes = ours["page_bytes"]

    assert len(theirs["strides"]) == ours["num_classes"] == 2
    assert ours["tokens"] == theirs["tokens"]
    assert len({tuple(tokens) for tokens in ours["tokens"]}) > 30  # the answers differ at all
    assert ours["num_preempted"] > 0
    assert theirs["num_preempted"] == 0

    assert ours["after_last"] > 2 * page_bytes  # cached
    assert ours["reset"]
    assert ours["after_reset"] <= 2 * page_bytes
    assert ours["asleep"] == page_bytes
    assert ours["after_wake"] == ours["tokens"][-3:]

    right = theirs["tokens"][-1]
    assert ours["cached"] == [right, right]
    assert all(wrong != right for wrong in ours["wrong"])  # both classes are read where we say
    assert ours["right_again"] == right
    assert list((tmp_path / "kv").iterdir()) == []
