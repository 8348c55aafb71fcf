"""What scripts share that ask a vLLM engine in this process about more than text."""

import os
import sys
from functools import cached_property
from typing import Any

from helpers.negated_block import stepped

NUM_PROMPTS, NUM_TOKENS = 12, 40


class Asking:
    """An engine of the model that the first argument of the script names.

    Attributes:
        is_elastic: Whether it is ours.

    Args:
        kind: What its prompts have beside text, as vLLM names it.
        options: Further arguments of `LLM`.
    """

    def __init__(self, kind: str, **options: Any) -> None:
        from vllm import LLM, SamplingParams

        self.is_elastic = os.environ.get("ENABLE_KVCACHED", "0") != "0"
        sizes = {} if self.is_elastic else {"kv_cache_memory_bytes": 256 << 20}
        self.llm = LLM(
            sys.argv[1],
            enforce_eager=True,
            dtype="float32",
            max_num_seqs=8,
            limit_mm_per_prompt={kind: 1},
            **options,
            **sizes,
        )
        self._sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)

    @cached_property
    def core(self) -> Any:
        """Its core."""
        return self.llm.llm_engine.engine_core.engine_core

    @cached_property
    def worker(self) -> Any:
        """Its worker."""
        return self.core.model_executor.driver_worker.worker

    def generate(self, prompts: Any) -> list[list[int]]:
        """Answer prompts."""
        answers = self.llm.generate(prompts, self._sampling)
        return [list(one.outputs[0].token_ids) for one in answers]

    def stepped(self, prompt: Any, group: int | None) -> list[int]:
        """Answer a prompt, with a wrong block in a group; see `negated_block.stepped`."""
        return stepped(self.llm, prompt, self._sampling, group)
