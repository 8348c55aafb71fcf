"""Run as a script: a vLLM engine answers prompts with images, and is tampered with; it reports.

Arguments: the folder of a BLIP-2, and a JSON object without words.
"""

import json
from typing import Any

from helpers.beyond_text import NUM_PROMPTS, Asking
from helpers.offline import resident
from helpers.vision_model import NUM_IMAGE_TOKENS, picture

BLOCK_TOKENS = 32
OTHER_PICTURE = 100


def prompt(words: int, seen: int) -> dict[str, Any]:
    """Return a few tokens to go on from, and an image; its tokens come first."""
    tokens = list(range(10 + words, 15 + words))
    return {"prompt_token_ids": tokens, "multi_modal_data": {"image": picture(seen)}}


def main() -> None:
    """Start, answer twice, plant a wrong block, report one JSON object on the last line."""
    asking = Asking("image", max_model_len=512, block_size=BLOCK_TOKENS)
    prompts = [prompt(number, number) for number in range(NUM_PROMPTS)]
    report: dict[str, Any] = {"tokens": [asking.generate(prompts) for _ in range(2)]}
    report["of_another_picture"] = asking.generate([prompt(0, OTHER_PICTURE)])[0]
    if asking.is_elastic:
        worker = asking.worker
        report["page_bytes"] = worker.kvcached.arena.geometry.page_bytes
        assert asking.llm.reset_prefix_cache()  # what is cached may stay
        report["after_last"] = resident(worker)
        report["num_image_blocks"] = NUM_IMAGE_TOKENS // BLOCK_TOKENS
        report["right"], report["wrong"] = (
            asking.stepped(prompts[0], group) for group in (None, 0)
        )
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main()
