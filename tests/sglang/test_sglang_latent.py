"""A model of latent keys and values (MLA), served by SGLang with the flag and without.

SGLang 0.5.15 cannot import its own DeepSeek models on a CPU. SGLang's other attention backend for
CPUs reads a latent as if it were keys and values, so both servers interpret the GPU's kernels.
"""

from pathlib import Path

import pytest
from helpers.sglang_engine import answers, resident_by_proc, short_bursts, twins
from helpers.sglang_models import deepseek, save
from helpers.waiting import await_that

from kvcached_core.ledger import Ledger

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(400)]

SETTLE_SECONDS = 10.0


def test_tokens_of_a_latent_model_are_vanillas_and_its_memory_goes(tmp_path: Path) -> None:
    model = save(deepseek, tmp_path / "model")
    arguments = ("--disable-radix-cache", "--attention-backend", "triton")
    with twins(model, tmp_path, *arguments) as servers:
        found = [answers(server, short_bursts()[:1]) for server in servers]
        (path,) = (tmp_path / "kv").glob("*.ledger")
        with Ledger(path) as ledger:
            (view,) = ledger.view().instances
        await_that(lambda: resident_by_proc(servers[0]) <= 2 * view.page_bytes, SETTLE_SECONDS)
    assert found[0] == found[1]
    assert {error for error, _ in found[0]} == {None}
    assert len({tuple(tokens) for _, tokens in found[0]}) == len(found[0])
