"""A model that hears: keys and values of its sounds and of its words lie in our pages."""

from pathlib import Path

import pytest
from helpers.engines import finish, offline_in
from helpers.whisper_model import make_whisper

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.every_release]


def test_what_is_heard_is_written_as_by_vanilla_and_a_wrong_block_of_either_changes_it(
    tmp_path: Path,
) -> None:
    start = offline_in(tmp_path, make_whisper(tmp_path / "whisper"))
    ours = {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_DIR": str(tmp_path / "kv"),
        "KVCACHED_HOST_POOL": "1GiB",
        "KVCACHED_DEBUG": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    started = [start(environ, "offline_heard") for environ in ({"ENABLE_KVCACHED": "0"}, ours)]
    vanilla, elastic = map(finish, started)
    assert (vanilla.returncode, elastic.returncode) == (0, 0), elastic.errors[-4000:]
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
