"""Run as a script: a vLLM engine answers from both ends of its ids, and is tampered with.

Arguments: a model folder, and a JSON object: `engine`, further options of `LLM`, and `layout`, a
layout of vLLM's that its attention on a CPU then says to read.
"""

import json
import os
import sys
from typing import Any

from helpers.offline import (
    ENGINE_OPTIONS,
    mixed_prompts,
    resident,
    resident_pages,
    take_from_the_top,
)
from helpers.offline_mixed import with_a_wrong_block

NUM_PROMPTS = 12
MAX_TOKENS = 24
NUM_TOP_PAGES = 24


def offer(layout: str) -> None:
    """Let attention on a CPU say that it reads this layout: it goes by strides, and does."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.kv_cache_layout import KVCacheLayout

    CPUAttentionBackend.supported_kv_cache_layouts = classmethod(
        lambda _cls: (KVCacheLayout[layout],)
    )


def main() -> None:
    """Start, generate at both ends, plant a wrong block, report one JSON object at last."""
    model, options = sys.argv[1], json.loads(sys.argv[2])
    elastic = os.environ.get("ENABLE_KVCACHED", "0") != "0"

    from vllm import LLM, SamplingParams

    if "layout" in options:
        offer(options["layout"])
    sizes = {} if elastic else {"kv_cache_memory_bytes": 512 << 20}
    settings = {**ENGINE_OPTIONS, **sizes, **options.get("engine", {})}
    llm = LLM(model, enable_prefix_caching=True, **settings)
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        requests: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(one.outputs[0].token_ids) for one in llm.generate(requests, sampling)]

    prompts = mixed_prompts()[:NUM_PROMPTS]
    if not elastic:
        print(json.dumps({"tokens": generate(prompts)}))
        return
    core = llm.llm_engine.engine_core.engine_core
    worker, pool = core.model_executor.driver_worker.worker, core.kvcached.port.pool
    arena = worker.kvcached.arena
    report: dict[str, Any] = {"page_bytes": arena.geometry.page_bytes}
    report["classes"] = [(each.block_bytes, each.num_planes) for each in arena.geometry.classes]
    below = take_from_the_top(pool, NUM_TOP_PAGES)
    report["at_the_top"] = generate(prompts)
    llm.reset_prefix_cache()
    report["resident"] = resident(worker)
    prompt = max(prompts, key=len)
    report["right"] = [generate([prompt])[0] for _ in range(2)]
    cached = [block.block_id for block in pool.blocks if block.block_hash is not None]
    # Of page 0 blocks are used, too; what lies first behind it are the prompt's own.
    first = min(number for number in cached if arena.geometry.page_of(number))
    report["top_page"] = arena.geometry.page_of(first)
    report["wrong"] = with_a_wrong_block(arena, 0, first, lambda: generate([prompt])[0])
    llm.reset_prefix_cache()
    for page in below:
        pool.pages.book.put_back(page)
    report["tokens"] = generate(prompts)
    report["pages"] = resident_pages(worker)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
