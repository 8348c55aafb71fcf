"""Run as a script: a vLLM engine whose layers differ in block size answers, and is tampered with.

Arguments: a model folder, and a JSON object with `caching` and, optionally, more `engine` options.
"""

import json
import os
import sys
from typing import Any

import torch

from helpers.offline import ENGINE_OPTIONS, MAX_SHORT_TOKENS, mixed_prompts, resident

NUM_PROMPTS = 36
MAX_TOKENS = 40  # more than a block has


def main() -> None:
    """Start, generate, sleep, plant wrong blocks, report one JSON object on the last line."""
    model, options = sys.argv[1], json.loads(sys.argv[2])
    elastic = os.environ.get("ENABLE_KVCACHED", "0") != "0"

    from vllm import LLM, SamplingParams

    sizes = {} if elastic else {"kv_cache_memory_bytes": 512 << 20}
    settings = {**ENGINE_OPTIONS, **sizes, **options.get("engine", {})}
    llm = LLM(
        model,
        trust_remote_code=True,
        enable_prefix_caching=options["caching"],
        **settings,
    )
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(one.outputs[0].token_ids) for one in llm.generate(requests, sampling)]

    prompts = mixed_prompts(MAX_SHORT_TOKENS)[:NUM_PROMPTS]
    core = llm.llm_engine.engine_core.engine_core
    preempted = count_preempted(core.scheduler)
    report: dict[str, Any] = {"tokens": generate(prompts)}
    report["num_preempted"] = len(preempted)
    report["strides"] = sorted(strides_of(core))
    if elastic:
        worker = core.model_executor.driver_worker.worker
        arena = worker.kvcached.arena
        report["page_bytes"] = arena.geometry.page_bytes
        report["num_classes"] = len(arena.geometry.classes)
        report["after_last"] = resident(worker)
        report["reset"] = llm.reset_prefix_cache()
        report["after_reset"] = resident(worker)
        llm.sleep(level=1)
        report["asleep"] = resident(worker)
        llm.wake_up()
        report["after_wake"] = generate(prompts[-3:])
        if options["caching"]:
            llm.reset_prefix_cache()
            prompt = prompts[-1]
            report["cached"] = [generate([prompt])[0] for _ in range(2)]
            pool = core.scheduler.kv_cache_manager.block_pool
            cached = next(block.block_id for block in pool.blocks if block.block_hash is not None)
            report["wrong"] = [
                with_a_wrong_block(arena, size_class, cached, lambda: generate([prompt])[0])
                for size_class in range(len(arena.geometry.classes))
            ]
            report["right_again"] = generate([prompt])[0]
    print(json.dumps(report))


def count_preempted(scheduler: Any) -> list[str]:
    """Return a list to which each preemption adds the request."""
    preempted, preempt = [], scheduler._preempt_request

    def counted(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    return preempted


def strides_of(core: Any) -> set[int]:
    """Return the block strides in the plan that the worker allocates."""
    config = core.scheduler.kv_cache_config
    return {
        getattr(tensor, "block_stride", 0) or tensor.size // config.num_blocks
        for tensor in config.kv_cache_tensors
    }


def with_a_wrong_block(arena: Any, size_class: int, block_id: int, answer: Any) -> list[int]:
    """Return an answer while a cached block holds other numbers, in the first plane of a class."""
    block_bytes = arena.geometry.classes[size_class].block_bytes
    start = block_id * block_bytes
    block = arena.plane_tensor(0, size_class)[start : start + block_bytes].view(torch.float32)
    kept = block.clone()
    block.neg_()
    try:
        tokens: list[int] = answer()
    finally:
        block.copy_(kept)
    return tokens


if __name__ == "__main__":
    main()
