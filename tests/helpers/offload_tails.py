"""Run as a script: a request ends, and another one waits for its blocks.

Arguments: the folder of a model whose windows have smaller blocks than its other layers, and a JSON
object: `copier` (see `Offloaded`), and `watches`, which is false where nobody shall look who has a
block that is to be stored.

The end of a request makes blocks of its window worth storing that vLLM has passed over.
"""

import json
import random
import sys
import zlib
from typing import Any

from helpers.offline import VOCABULARY
from helpers.offload_windows import storing_all
from helpers.offloaded import SAMPLING, Offloaded

NUM_PROMPT_TOKENS, NUM_TOKENS, NUM_WAITING_TOKENS = 140, 110, 400


def answer(engine: Offloaded, prompts: dict[str, list[int]]) -> None:
    """Answer the first prompt, and let others wait; all begin at once, and one runs."""
    from vllm import SamplingParams

    for name, prompt in prompts.items():
        num_tokens = NUM_TOKENS if name.startswith("first") else 1
        sampling = SamplingParams(max_tokens=num_tokens, **SAMPLING)
        engine.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
    engine.finish()


def stored(engine: Offloaded) -> dict[bytes, int]:
    """Return a sum of what the host tier has under each of its keys."""
    from helpers.delayed_copier import made

    (copier,) = made
    chunks = engine.core.scheduler.connector.connector_scheduler.manager._policy.chunks
    return {
        key: zlib.adler32(b"".join(host[chunk.chunk_id].numpy().tobytes() for host in copier._host))
        for key, chunk in chunks.items()
    }


def main() -> None:
    """Report of how many chunks the tier has what it has where nobody waits."""
    options = json.loads(sys.argv[2])
    engine = Offloaded(
        sys.argv[1], options["copier"], max_num_seqs=1, trust_remote_code=True, **storing_all()
    )
    if not options.get("watches", True):
        engine.core.kvcached.port.left.before_stores = lambda *_: None
    source = random.Random(5)
    first, other = (
        [source.randrange(3, VOCABULARY) for _ in range(num_tokens)]
        for num_tokens in (NUM_PROMPT_TOKENS, NUM_WAITING_TOKENS)
    )
    answer(engine, {"first": first})
    alone = stored(engine)
    assert engine.core.reset_prefix_cache(reset_connector=True)
    answer(engine, {"first-again": first, "waiting": other})
    beside = stored(engine)
    same = [alone[key] == beside[key] for key in alone.keys() & beside.keys()]
    report: dict[str, Any] = {
        "num_alone": len(alone),
        "num_same": sum(same),
        "num_other": len(same) - sum(same),
    }
    engine.core.reset_prefix_cache()
    report["pages"] = engine.resident_pages()
    print("\n" + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
