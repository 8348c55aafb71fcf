"""A real engine whose layers differ in block size answers as vanilla does, from each class."""

from pathlib import Path

import pytest
from helpers.engines import VANILLA, Offline, offline_in, ours, report_of
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


def test_tokens_and_memory_of_layers_that_differ_in_block_size(
    start: Offline, tmp_path: Path
) -> None:
    environ = ours(tmp_path, KVCACHED_HOST_POOL=POOL, KVCACHED_DEBUG="1")
    started = [
        start(VANILLA, "offline_mixed", caching=False),
        start(environ, "offline_mixed", caching=True),
    ]
    vanilla, elastic = map(report_of, started)
    page_bytes = elastic["page_bytes"]

    assert len(vanilla["strides"]) == elastic["num_classes"] == 2
    assert elastic["tokens"] == vanilla["tokens"]
    assert len({tuple(tokens) for tokens in elastic["tokens"]}) > 30  # the answers differ at all
    assert elastic["num_preempted"] > 0
    assert vanilla["num_preempted"] == 0

    assert elastic["after_last"] > 2 * page_bytes  # cached
    assert elastic["reset"]
    assert elastic["after_reset"] <= 2 * page_bytes
    assert elastic["asleep"] == page_bytes
    assert elastic["after_wake"] == elastic["tokens"][-3:]

    right = vanilla["tokens"][-1]
    assert elastic["cached"] == [right, right]
    assert all(wrong != right for wrong in elastic["wrong"])  # both classes are read where we say
    assert elastic["right_again"] == right
    assert list((tmp_path / "kv").iterdir()) == []
