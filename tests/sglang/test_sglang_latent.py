"""A model of latent keys and values (MLA), served by SGLang with the flag and without.

SGLang 0.5.15 cannot import its own DeepSeek models on a CPU. SGLang's other attention backend for
CPUs reads a latent as if it were keys and values, so both servers interpret the GPU's kernels.
"""

from pathlib import Path

import pytest
from helpers.process_memory import resident_by_proc
from helpers.sglang_engine import Models, Vanilla, answers, elastic_server, short_bursts
from helpers.sglang_models import deepseek
from helpers.waiting import await_that

from kvcached_core.ledger.ledger import Ledger

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.newest_release]


def test_tokens_of_a_latent_model_are_vanillas_and_its_memory_goes(
    tmp_path: Path, models: Models, vanilla: Vanilla
) -> None:
    bursts = tuple(short_bursts()[:1])
    kernels = ("--attention-backend", "triton", "--triton-attention-num-kv-splits", "1")
    flags = ("--disable-radix-cache", *kernels)
    expected = vanilla(models(deepseek), bursts, *flags)
    with elastic_server(models(deepseek), tmp_path, *flags) as server:
        assert answers(server, bursts) == expected
        (path,) = (tmp_path / "kv").glob("*.ledger")
        with Ledger(path) as ledger:
            (view,) = ledger.view().instances
        await_that(lambda: resident_by_proc(server) <= 2 * view.page_bytes)
    assert len({tuple(tokens) for _, tokens in expected}) == len(expected)
