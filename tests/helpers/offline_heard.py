"""Run as a script: a vLLM engine writes what it hears, and is tampered with; it reports.

Arguments: the folder of a Whisper, and a JSON object without words.
"""

import json
import os
import sys
from typing import Any

from helpers.negated_block import stepped
from helpers.offline import resident
from helpers.whisper_model import START_TOKEN, sound

NUM_PROMPTS, NUM_TOKENS = 12, 40


def prompt(words: int, heard: int) -> dict[str, Any]:
    """Return a few tokens to go on from, and a sound."""
    tokens = [START_TOKEN, *range(10 + words, 15 + words)]
    return {"prompt_token_ids": tokens, "multi_modal_data": {"audio": (sound(heard), 16_000)}}


def main() -> None:
    """Start, answer twice, plant wrong blocks, report one JSON object on the last line."""
    elastic = os.environ.get("ENABLE_KVCACHED", "0") != "0"

    from vllm import LLM, SamplingParams

    sizes = {} if elastic else {"kv_cache_memory_bytes": 256 << 20}
    llm = LLM(
        sys.argv[1],
        enforce_eager=True,
        dtype="float32",
        max_model_len=448,
        block_size=32,
        max_num_seqs=8,
        limit_mm_per_prompt={"audio": 1},
        **sizes,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)

    def generate(prompts: Any) -> list[list[int]]:
        return [list(one.outputs[0].token_ids) for one in llm.generate(prompts, sampling)]

    prompts = [prompt(number, number) for number in range(NUM_PROMPTS)]
    report: dict[str, Any] = {"tokens": [generate(prompts) for _ in range(2)]}
    report["of_another_sound"] = generate([prompt(0, 4)])[0]
    if elastic:
        core = llm.llm_engine.engine_core.engine_core
        worker = core.model_executor.driver_worker.worker
        report["after_last"] = resident(worker)
        report["page_bytes"] = worker.kvcached.arena.geometry.page_bytes
        groups = core.scheduler.kv_cache_config.kv_cache_groups
        report["groups"] = [type(group.kv_cache_spec).__name__ for group in groups]
        report["right"] = stepped(llm, prompts[0], sampling, None)
        report["wrong"] = [
            stepped(llm, prompts[0], sampling, number) for number in range(len(groups))
        ]
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main()
