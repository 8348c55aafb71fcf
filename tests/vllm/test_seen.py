"""A model that sees: keys and values of its images' tokens lie in our pages."""

from pathlib import Path

import pytest
from helpers.engines import run_beside_vanilla
from helpers.vision_model import make_vision_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.every_release]


def test_what_is_seen_is_answered_as_by_vanilla_and_a_wrong_block_of_an_image_changes_it(
    tmp_path: Path,
) -> None:
    model = make_vision_model(tmp_path / "blip")
    vanilla, elastic = run_beside_vanilla(tmp_path, model, "offline_seen")
    report = elastic.report
    assert report["tokens"] == vanilla.report["tokens"]
    first = report["tokens"][0]
    assert len({tuple(tokens) for tokens in first}) > 9
    assert report["of_another_picture"] == vanilla.report["of_another_picture"] != first[0]
    assert report["num_image_blocks"] > 0  # the first block has tokens of the image alone
    assert report["right"] == first[0]
    assert report["wrong"] != first[0]
    assert report["after_last"] <= 2 * report["page_bytes"]
    assert "keys and values of all tokens are elastic" in elastic.output + elastic.errors
