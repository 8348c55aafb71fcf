"""Run as a script: one vLLM engine on a GPU answers 200 mixed prompts and reports.

Arguments: a model folder, and a JSON object: `caching`, `engine` (further arguments of `LLM`),
`num_prompts`, `max_prompt`, `vanilla_kv_gib`, `top` (hand out the pages at the top of the
reservation), `cascade` (all prompts begin alike, and calls of cascade attention are counted) and
`sleep`.
"""

import json
import os
import random
import sys
import threading
import time
from typing import Any

from helpers.offline import take_from_the_top

MAX_TOKENS = 32
NUM_TOP_PAGES = 512


def mixed_prompts(num_prompts: int, max_prompt: int) -> list[list[int]]:
    """Return short prompts, long ones, and ones that share a prefix."""
    source = random.Random(0)
    shared = [source.randrange(3, 1000) for _ in range(max_prompt // 2)]
    prompts = []
    for index in range(num_prompts):
        is_short = index % 3 == 0
        length = source.randrange(4, 60) if is_short else source.randrange(100, max_prompt)
        prompt = [source.randrange(3, 1000) for _ in range(length)]
        prompts.append(shared + prompt[: max_prompt // 2] if index % 3 == 2 else prompt)
    return prompts


def alike_prompts(num_prompts: int, num_alike: int) -> list[list[int]]:
    """Return prompts that all begin with the same tokens, and end with a few of their own."""
    source = random.Random(0)
    shared = [source.randrange(3, 1000) for _ in range(num_alike)]
    return [shared + [source.randrange(3, 1000) for _ in range(20)] for _ in range(num_prompts)]


def prompts_of(options: dict[str, Any]) -> list[Any]:
    """Return the prompts that the options ask for."""
    make = alike_prompts if options.get("cascade") else mixed_prompts
    prompts = make(options.get("num_prompts", 200), options.get("max_prompt", 900))
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def count_cascades() -> list[int]:
    """Return a list that grows with each call of cascade attention."""
    from vllm.v1.attention.backends import flash_attn

    calls: list[int] = []
    original = flash_attn.cascade_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    flash_attn.cascade_attention = counted
    return calls


def give_weights(worker: Any) -> None:
    """Fill the weights so that answers depend on the prompt: dummy ones are nearly zero."""
    fill(getattr(worker, "worker", worker).model_runner.model)


def fill(model: Any, seed: int = 0) -> None:
    """Fill the matrices of a model, those of packed integers too, the same for the same seed."""
    import torch

    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    parameters = sorted(model.named_parameters())
    is_packed = any(parameter.dtype == torch.int32 for _, parameter in parameters)
    with torch.no_grad():
        for name, parameter in parameters:
            if is_packed and "norm" in name:
                # Behind dummy ones no layer adds much to an answer. A packed weight that is wrong
                # is no larger than others, and would not be missed.
                parameter.fill_(0.1)
            if parameter.dim() < 2 or parameter.itemsize < 2:
                continue
            if parameter.is_floating_point():
                scale = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
                parameter.normal_(0, scale, generator=generator)
            elif parameter.dtype == torch.int32:
                parameter.random_(-(2**31), 2**31, generator=generator)


def free_bytes() -> int:
    """Return the device's free memory."""
    import torch

    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def resident(worker: Any) -> int:
    """Return the bytes of the pages that are mapped."""
    worker.kvcached.keeper.wait()
    arena = worker.kvcached.arena
    assert worker.kvcached.backend.created_bytes == arena.resident_bytes
    return arena.resident_bytes


def main() -> None:
    """Start, generate twice, report one JSON object on the last line."""
    model, options = sys.argv[1], json.loads(sys.argv[2])
    elastic = os.environ.get("ENABLE_KVCACHED", "0") != "0"
    begin = time.perf_counter()

    from vllm import LLM, SamplingParams

    imported = time.perf_counter()
    seized = {
        "kv_cache_memory_bytes": options.get("vanilla_kv_gib", 3) << 30,
        "gpu_memory_utilization": 0.05,  # vLLM refuses to start beside others otherwise
    }
    llm = LLM(
        model,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=4096,
        seed=0,
        enable_prefix_caching=options["caching"],
        **({} if elastic else seized),
        **options.get("engine", {}),
    )
    report: dict[str, Any] = {"ready_seconds": time.perf_counter() - imported}
    report["import_seconds"] = imported - begin
    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    report["runner"] = type(worker.model_runner).__module__
    report["async"] = bool(core.async_scheduling)
    if elastic:
        from helpers.backends import count_calls

        worker.kvcached.keeper.wait()
        count_calls(worker.kvcached)
        geometry = core.kvcached.geometry
        report["page_bytes"] = geometry.page_bytes
        report["geometry"] = vars(geometry) | {"num_pages": worker.kvcached.arena.num_pages}
        report["after_start"] = resident(worker)
        if options.get("top"):
            take_from_the_top(core.kvcached.port.pool, NUM_TOP_PAGES)
    give_weights(worker)
    extra = {"lora_request": lora(options["lora"])} if "lora" in options else {}
    cascades = count_cascades()
    prompts = prompts_of(options)
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)

    def generate() -> list[list[int]]:
        outputs = llm.generate(prompts, sampling, use_tqdm=False, **extra)
        return [list(output.outputs[0].token_ids) for output in outputs]

    start = time.perf_counter()
    report["tokens"] = [generate(), generate()]
    report["generate_seconds"] = time.perf_counter() - start
    report["num_cascades"] = len(cascades)
    if elastic:
        report["after_last"] = resident(worker)
        report["top_page"] = max(worker.kvcached.arena.resident_pages)
        report["steady"] = steady_decode(llm, core, worker)
        if options["caching"]:
            core.kvcached.port.evict(1 << 30)
            core.kvcached.flush(is_last=True)
            report["after_trim"] = resident(worker)
        view = worker.kvcached.ledger.view()
        report["view"] = json.loads(json.dumps(view, default=vars))
    if options.get("sleep"):
        report["sleep"] = [sleep(llm, worker, level, generate) for level in (1, 2)]
    print("\n" + json.dumps(report))
    sys.stdout.flush()
    os._exit(0)  # an engine in this process would take seconds to tear down


def steady_decode(llm: Any, core: Any, worker: Any) -> dict[str, Any]:
    """Decode with growing contexts and count the backend's calls on the engine's thread."""
    from vllm import SamplingParams

    counting, maps = worker.kvcached.backend, worker.kvcached.arena.maps
    scheduler = core.scheduler
    schedule = scheduler.schedule
    counts: list[tuple[int, int, int]] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        me = counting.num_calls_of_thread(threading.get_ident())
        counts.append((me, maps.times().num_calls, len(scheduler.running)))
        return schedule(*args, **kwargs)

    scheduler.schedule = counted
    prompt = {"prompt_token_ids": list(range(3, 103))}
    sampling = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    llm.generate([prompt] * 32, sampling, use_tqdm=False)
    del scheduler.schedule
    # Steady: from 20 steps after the start to 20 before the end.
    first, last = counts[20], counts[-20]
    return {
        "num_steps": len(counts) - 40,
        "num_calls": last[0] - first[0],
        "num_mapped": last[1] - first[1],
    }


def sleep(llm: Any, worker: Any, level: int, generate: Any) -> dict[str, Any]:
    """Sleep, let a neighbour use the memory, wake and answer again."""
    import torch

    report: dict[str, Any] = {}
    model = getattr(worker, "worker", worker).model_runner.model
    weights = {name: value.cpu() for name, value in model.named_parameters()}
    before = free_bytes()
    llm.sleep(level)
    report["freed_bytes"] = free_bytes() - before
    if hasattr(worker, "kvcached"):
        report["asleep"] = resident(worker)
    neighbour = torch.empty(free_bytes() // 2, dtype=torch.int8, device="cuda").fill_(-1)
    del neighbour
    torch.cuda.empty_cache()
    llm.wake_up()
    if level == 2:  # the weights are gone, too, and whoever wakes the engine loads them again
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(weights[name])
    report["tokens"] = generate()
    return report


def lora(folder: str) -> Any:
    """Return a request for the adapter in `folder`."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, folder)


if __name__ == "__main__":
    main()
