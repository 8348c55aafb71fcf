"""Run as a script: a vLLM engine writes what it hears, and is tampered with; it reports.

Arguments: the folder of a Whisper, and a JSON object without words.
"""

import json
from typing import Any

from helpers.beyond_text import NUM_PROMPTS, Asking
from helpers.offline import resident
from helpers.whisper_model import START_TOKEN, sound


def prompt(words: int, heard: int) -> dict[str, Any]:
    """Return a few tokens to go on from, and a sound."""
    tokens = [START_TOKEN, *range(10 + words, 15 + words)]
    return {"prompt_token_ids": tokens, "multi_modal_data": {"audio": (sound(heard), 16_000)}}


def main() -> None:
    """Start, answer twice, plant wrong blocks, report one JSON object on the last line."""
    asking = Asking("audio", max_model_len=448, block_size=32)
    prompts = [prompt(number, number) for number in range(NUM_PROMPTS)]
    report: dict[str, Any] = {"tokens": [asking.generate(prompts) for _ in range(2)]}
    report["of_another_sound"] = asking.generate([prompt(0, 4)])[0]
    if asking.is_elastic:
        worker = asking.worker
        report["after_last"] = resident(worker)
        report["page_bytes"] = worker.kvcached.arena.geometry.page_bytes
        groups = asking.core.scheduler.kv_cache_config.kv_cache_groups
        report["groups"] = [type(group.kv_cache_spec).__name__ for group in groups]
        report["right"] = asking.stepped(prompts[0], None)
        report["wrong"] = [asking.stepped(prompts[0], number) for number in range(len(groups))]
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main()
