"""Full and sliding-window layers that share one pool: SGLang's own choice, or ours.

SGLang serves Gemma 3 from one pool and Laguna from two, of which our flag makes one. Vanilla is
told to: on a CPU SGLang 0.5.15 reads the window's pool at ids of the other one, and ends.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.sglang_engine import answers, mixed_bursts, start_sglang
from helpers.sglang_models import WINDOW_TOKENS, gemma, laguna, save

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(400)]

NUM_BURSTS = 4


@pytest.mark.parametrize("make", [gemma, laguna])
def test_tokens_of_a_sliding_window_mix_are_vanillas(
    tmp_path: Path, make: Callable[[], Any]
) -> None:
    model = save(make, tmp_path / "model")
    servers = [
        start_sglang("elastic", model, tmp_path, "--disable-radix-cache", core=0),
        start_sglang(
            "vanilla",
            model,
            tmp_path,
            *("--disable-radix-cache", "--disable-hybrid-swa-memory"),
            elastic=False,
            core=1,
        ),
    ]
    bursts = mixed_bursts()[:NUM_BURSTS]
    assert max(len(prompt) for burst in bursts for prompt in burst.prompts) > WINDOW_TOKENS
    try:
        for server in servers:
            server.wait_ready()
        found = [answers(server, bursts) for server in servers]
        logs = [server.log.read_text() for server in servers]
    finally:
        for server in servers:
            server.kill()
    assert "kvcached: process" in logs[0]
    assert ["swa size" in log for log in logs] == [False, False]
    assert found[0] == found[1]
    assert {error for error, _ in found[0]} == {None}
