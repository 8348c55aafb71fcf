"""A model that hears: keys and values of its sounds and of its words lie in our pages."""

from pathlib import Path

import pytest
from helpers.engines import run_beside_vanilla
from helpers.whisper_model import make_whisper

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.every_release]


def test_what_is_heard_is_written_as_by_vanilla_and_a_wrong_block_of_either_changes_it(
    tmp_path: Path,
) -> None:
    model = make_whisper(tmp_path / "whisper")
    vanilla, elastic = run_beside_vanilla(tmp_path, model, "offline_heard")
    report = elastic.report
    assert report["tokens"] == vanilla.report["tokens"]
    first = report["tokens"][0]
    assert len({tuple(tokens) for tokens in first}) > 9
    assert report["of_another_sound"] == vanilla.report["of_another_sound"] != first[0]
    assert sorted(report["groups"]) == ["CrossAttentionSpec", "FullAttentionSpec"]
    assert report["right"] == first[0]
    assert all(tokens != first[0] for tokens in report["wrong"])
    assert report["after_last"] <= 2 * report["page_bytes"]
    assert "keys and values of all tokens are elastic" in elastic.output + elastic.errors
