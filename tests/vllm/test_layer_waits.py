"""A real vLLM engine computes on its first layers while its last ones are still on their way."""

from pathlib import Path

import pytest
from helpers.engines import VANILLA, Offline, report_of, yielding

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.every_release]


def test_a_prompt_begins_while_weights_come_and_its_answer_is_vanillas(
    start_offline: Offline, tmp_path: Path
) -> None:
    environ = yielding(tmp_path, KVCACHED_WEIGHTS_WAIT="layers")
    started = [
        start_offline(VANILLA, "offline_arriving", vanilla=True),
        start_offline(environ, "offline_arriving"),
    ]
    vanilla, report = map(report_of, started)
    assert report["tokens"] == vanilla["tokens"]
    assert report["is_trusted"]
    num_pages = report["num_pages"]
    assert num_pages > 16

    # A copy for each page: at each layer fewer of them are open, and at the first one most are.
    whole, half = report["from_nothing"], report["from_half"]
    assert whole["is_same"]
    assert half["is_same"]
    assert num_pages > whole["open"][0] > num_pages // 2
    assert whole["open"] == sorted(whole["open"], reverse=True)
    assert len(set(whole["open"])) >= 3
    assert half["open"][0] == num_pages - num_pages // 2  # its first layer has stayed
    assert half["open"] == sorted(half["open"], reverse=True)
    assert whole["is_over"]
    assert half["is_over"]

    assert report["open_after_a_wake"] == num_pages
    assert report["open_after_a_wake_by_hand"] == 0
    assert report["open_after_a_sleep"] == [0, 0]
    assert report["is_read_whole"]
    assert report["same_afterwards"]

    few = report["from_a_few"]
    assert few["is_same"]
    assert few["is_over"]
    assert max(few["open"]) == report["open_of_a_few"] == 2
    assert report["unbegun"] == num_pages - 2
    assert report["left_at_rest"] == [0, 0]
    assert report["same_after_a_few"]

    assert report["refused_waits"]["is_same"]
    assert report["refused_waits"]["open"][0] == 0

    assert report["waits_left_out_differ"]
    assert report["same_at_last"]
