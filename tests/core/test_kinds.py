"""What is elastic of an engine is said in one line."""

import pytest

from kvcached_core.engine.kinds import elastic_parts


@pytest.mark.parametrize(
    ("generates", "is_multimodal", "said"),
    [(True, False, None), (False, True, "embeds or scores"), (True, True, "more than text")],
)
def test_what_is_elastic_is_said_in_one_line(
    said: str | None, *, generates: bool, is_multimodal: bool
) -> None:
    line = elastic_parts("vLLM", generates=generates, is_multimodal=is_multimodal)
    assert (line is None) == (said is None)
    assert line is None or (said in line and "\n" not in line)  # type: ignore[operator]
