"""Run as a script: a chunk of the host tier begins in front of what a window left in the cache.

Arguments: the folder of a model with windows, and a JSON object: `copier` (see `Offloaded`).

The tier forgets a prompt, the device does not. The next request begins with that prompt: it has
none of the blocks in front of its window, and what it stores of the chunk that they are in is all
that the tier has of it.
"""

import json
import random
import sys
from typing import Any

from helpers.offline import VOCABULARY
from helpers.offload_acts import lose_cache
from helpers.offloaded import BLOCK_TOKENS, IS_ELASTIC, Offloaded

BLOCKS_PER_CHUNK = 4
NUM_SHARED_TOKENS = 2 * BLOCKS_PER_CHUNK * BLOCK_TOKENS
# A window of two blocks ends one block behind the chunk, so one of two is in it; or at its end.
NUM_CACHED_TOKENS = {"behind": NUM_SHARED_TOKENS + BLOCK_TOKENS, "at": NUM_SHARED_TOKENS}
NUM_OTHER_TOKENS, NUM_ANSWER_TOKENS = 800, 24


def main() -> None:
    """Have such chunks stored, lose the cache, and ask for what begins as they do."""
    options = json.loads(sys.argv[2])
    engine = Offloaded(sys.argv[1], options["copier"])
    source = random.Random(5)

    def draw(num_tokens: int) -> list[int]:
        return [source.randrange(3, VOCABULARY) for _ in range(num_tokens)]

    def ask(prompt: list[int], num_tokens: int = 1) -> list[list[int]]:
        answers = engine.generate([prompt], num_tokens)
        engine.finish()  # vLLM alone answers before its copies have ended
        return answers

    report: dict[str, Any] = {}
    for name, num_cached in NUM_CACHED_TOKENS.items():
        shared = draw(num_cached + 1)
        later = shared[:NUM_SHARED_TOKENS] + draw(1)
        expected = ask(later, NUM_ANSWER_TOKENS)
        assert engine.core.reset_prefix_cache(reset_connector=True)
        ask(shared)
        for _ in range(2):
            ask(draw(NUM_OTHER_TOKENS))
        before = engine.count("vllm:prefix_cache_hits"), engine.hits()
        ask(shared + draw(BLOCK_TOKENS))
        hits = engine.count("vllm:prefix_cache_hits"), engine.hits()
        lose_cache(engine, {})
        is_right = ask(later, NUM_ANSWER_TOKENS) == expected
        report[name] = {
            "cached": hits[0] - before[0] == num_cached and hits[1] == before[1],
            "hit_tokens": engine.hits() - hits[1],
            "is_right": is_right,
        }
        assert engine.core.reset_prefix_cache(reset_connector=True)
    if IS_ELASTIC:
        report["pages"] = engine.resident_pages()
    print("\n" + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
