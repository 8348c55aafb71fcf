"""Run as a script: a vLLM engine answers prompts with images, and is tampered with; it reports.

Arguments: the folder of a BLIP-2, and a JSON object without words.
"""

import json
import os
import sys
from typing import Any

from helpers.negated_block import stepped
from helpers.offline import resident
from helpers.vision_model import NUM_IMAGE_TOKENS, picture

NUM_PROMPTS, NUM_TOKENS, BLOCK_TOKENS = 12, 40, 32
OTHER_PICTURE = 100


def prompt(words: int, seen: int) -> dict[str, Any]:
    """Return a few tokens to go on from, and an image; its tokens come first."""
    tokens = list(range(10 + words, 15 + words))
    return {"prompt_token_ids": tokens, "multi_modal_data": {"image": picture(seen)}}


def main() -> None:
    """Start, answer twice, plant a wrong block, report one JSON object on the last line."""
    elastic = os.environ.get("ENABLE_KVCACHED", "0") != "0"

    from vllm import LLM, SamplingParams

    sizes = {} if elastic else {"kv_cache_memory_bytes": 256 << 20}
    llm = LLM(
        sys.argv[1],
        enforce_eager=True,
        dtype="float32",
        max_model_len=512,
        block_size=BLOCK_TOKENS,
        max_num_seqs=8,
        limit_mm_per_prompt={"image": 1},
        **sizes,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)

    def generate(prompts: Any) -> list[list[int]]:
        return [list(one.outputs[0].token_ids) for one in llm.generate(prompts, sampling)]

    prompts = [prompt(number, number) for number in range(NUM_PROMPTS)]
    report: dict[str, Any] = {"tokens": [generate(prompts) for _ in range(2)]}
    report["of_another_picture"] = generate([prompt(0, OTHER_PICTURE)])[0]
    if elastic:
        core = llm.llm_engine.engine_core.engine_core
        worker = core.model_executor.driver_worker.worker
        report["page_bytes"] = worker.kvcached.arena.geometry.page_bytes
        assert llm.reset_prefix_cache()  # what is cached may stay
        report["after_last"] = resident(worker)
        report["num_image_blocks"] = NUM_IMAGE_TOKENS // BLOCK_TOKENS
        report["right"], report["wrong"] = (
            stepped(llm, prompts[0], sampling, group) for group in (None, 0)
        )
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main()
