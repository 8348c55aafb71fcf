"""Run as a script: one vLLM engine in this process answers 60 mixed prompts and reports.

Arguments: a model folder, and a JSON object with `caching` and, optionally, `tamper`.
"""

import json
import os
import random
import sys
from typing import Any

NUM_PROMPTS = 60
MAX_TOKENS, MAX_SHORT_TOKENS = 900, 450
VOCABULARY = 500
ENGINE_OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 2048,
    "block_size": 32,
    "max_num_seqs": 24,
}


def mixed_prompts(max_tokens: int = MAX_TOKENS) -> list[list[int]]:
    """Return short prompts, long ones, and ones that share a prefix."""
    source = random.Random(0)
    shared = [source.randrange(3, VOCABULARY) for _ in range(max_tokens * 4 // 9)]
    prompts = []
    for index in range(NUM_PROMPTS):
        length = (
            source.randrange(4, 40)
            if index % 3 == 0
            else source.randrange(max_tokens // 3, max_tokens)
        )
        prompt = [source.randrange(3, VOCABULARY) for _ in range(length)]
        prompts.append(shared + prompt[:100] if index % 3 == 2 else prompt)
    return prompts


def lose_orders() -> None:
    """Plant the defect that the debug check is for: the workers are never told to map."""
    from vllm.v1.core.sched.scheduler import Scheduler

    schedule = Scheduler.schedule

    def forgetful(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = schedule(self, *args, **kwargs)
        output.__dict__.pop("kvcached_orders", None)
        return output

    Scheduler.schedule = forgetful


def resident_pages(worker: Any) -> list[int]:
    """Return the pages that a rank has mapped when all its orders are carried out."""
    from kvcached_vllm.worker import inner_worker

    memory = inner_worker(worker).kvcached
    memory.keeper.wait()
    return sorted(memory.arena.resident_pages)


def take_from_the_top(pool: Any, num_pages: int) -> list[int]:
    """Leave only so many pages at the end of the reservation to be opened; return the others."""
    book, first = pool.pages.book, pool.blocks.num_pages - num_pages
    below = [page for page in book._unmapped if page < first]
    book._unmapped = sorted(set(book._unmapped).difference(below))
    return below


def main() -> None:
    """Start, generate twice, report one JSON object on the last line."""
    model, options = sys.argv[1], json.loads(sys.argv[2])
    elastic = os.environ.get("ENABLE_KVCACHED", "0") != "0"

    from vllm import LLM, SamplingParams

    sizes = {} if elastic else {"kv_cache_memory_bytes": 512 << 20}
    llm = LLM(model, **ENGINE_OPTIONS, enable_prefix_caching=options["caching"], **sizes)
    report: dict[str, Any] = {}
    core = llm.llm_engine.engine_core.engine_core
    if elastic:
        from kvcached_core.config import read_config
        from kvcached_core.control import trim

        engine = core.kvcached
        worker = core.model_executor.driver_worker.worker
        report["after_start"] = resident(worker)
        if options.get("tamper"):
            lose_orders()
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in mixed_prompts(MAX_SHORT_TOKENS)]
    report["tokens"] = [
        [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling)]
        for _ in range(2)
    ]
    if elastic:
        report["page_bytes"] = engine.geometry.page_bytes
        report["after_last"] = resident(worker)
        report["view"] = json.loads(json.dumps(worker.kvcached.ledger.view(), default=vars))
        report["usage"] = core.scheduler.kv_cache_manager.usage
        report["reset"] = llm.reset_prefix_cache()
        report["after_reset"] = resident(worker)
        report["mapped_calls"] = worker.kvcached.arena.maps.times().num_calls
        trim([], directory=read_config().dir, wait_seconds=0)
        engine.between_steps()
        report["after_trim"] = resident(worker)
    print(json.dumps(report))


def resident(worker: Any) -> int:
    """Return the resident bytes of the KV range as the kernel sees them."""
    from helpers.process_memory import resident_bytes

    worker.kvcached.keeper.wait()
    arena = worker.kvcached.arena
    return resident_bytes(arena.address, arena.num_bytes)


if __name__ == "__main__":
    main()
