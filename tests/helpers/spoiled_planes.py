"""Lets SGLang's processes speculate on a CPU, and spoils keys where a test wants that.

Nothing of SGLang is imported before it calls us.
"""

import os
from functools import wraps
from pathlib import Path
from typing import Any

from helpers import speculating_kernels

VARIABLE = "SPOILED_PLANES"
TARGET, DRAFT = "target", "draft"


def register() -> None:
    """Have the kernels of this process be the tests', and look at each batch before it runs."""
    speculating_kernels.register()
    from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2
    from sglang.srt.speculative.ngram_worker import NGRAMWorker

    for worker in (EAGLEWorkerV2, NGRAMWorker):
        worker.forward_batch_generation = _spoiling(worker.forward_batch_generation)


def _spoiling(original: Any) -> Any:
    @wraps(original)
    def wrapper(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        file = Path(os.environ[VARIABLE])
        if file.exists() and batch.forward_mode.is_decode():
            drafts = file.read_text() == DRAFT
            spoil(
                self.draft_worker.draft_runner if drafts else self.target_worker.model_runner, batch
            )
        return original(self, batch, *args, **kwargs)

    return wrapper


def spoil(runner: Any, batch: Any) -> None:
    """Let the target, or the draft, have nothing as the keys of all tokens of a batch."""
    table = batch.req_to_token_pool.req_to_token
    for row, length in zip(batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True):
        pool = runner.token_to_kv_pool
        pool = getattr(pool, "full_kv_pool", pool)  # of all layers, or of some
        for plane in pool.k_buffer:
            plane[table[row, :length].long()] = 0
