"""One vLLM engine on a GPU whose weights go and come: run in a process of its own."""

import json
import os
import sys
from typing import Any

from helpers.gpu_offline import lora, mixed_prompts

MAX_TOKENS = 24


def main() -> None:
    """Start, generate, give, bring, generate; report one JSON object on the last line."""
    model, options = sys.argv[1], json.loads(sys.argv[2])
    elastic = os.environ.get("ENABLE_KVCACHED", "0") != "0"
    from vllm import LLM, SamplingParams

    sizes = {"kv_cache_memory_bytes": 3 << 30, "gpu_memory_utilization": 0.05}
    llm = LLM(
        model,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=4096,
        seed=0,
        enable_prefix_caching=False,
        worker_extension_cls="helpers.seeded.Seeded",
        **({} if elastic else sizes),
        **options.get("engine", {}),
    )
    core = llm.llm_engine.engine_core.engine_core
    extra = {"lora_request": lora(options["lora"])} if "lora" in options else {}
    prompts = [{"prompt_token_ids": prompt} for prompt in mixed_prompts(24, 600)]
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)

    def generate() -> list[list[int]]:
        outputs = llm.generate(prompts, sampling, use_tqdm=False, **extra)
        return [list(output.outputs[0].token_ids) for output in outputs]

    report: dict[str, Any] = {"tokens": generate(), "again": generate()}
    worker = core.model_executor.driver_worker.worker
    report["runner"] = type(worker.model_runner).__module__
    if elastic:
        report |= come_and_go(core, worker, generate)
    print("\n" + json.dumps(report))
    sys.stdout.flush()
    os._exit(0)  # an engine in this process would take seconds to tear down


def come_and_go(core: Any, worker: Any, generate: Any) -> dict[str, Any]:
    """Give all weights, then half of them, each time for a request; then spoil a page."""
    import time

    import torch

    from kvcached_vllm.elastic_weights import weights_of

    weights = weights_of(worker)
    deadline = time.monotonic() + 60
    while not weights.rank.status().is_copied:
        assert time.monotonic() < deadline, "no host copy"
        time.sleep(0.05)
    report: dict[str, Any] = {
        "bound_bytes": weights.adopted.binding.bound_bytes,
        "static": weights.adopted.binding.static,
        "num_pages": weights.rank.status().num_pages,
        "do_layers_wait": weights.walks is not None and weights.walks._is_trusted is True,
    }

    def hold(num_pages: int) -> None:
        torch.cuda.synchronize()
        assert weights.rank.hold(num_pages).num_resident_pages == num_pages

    num_pages = report["num_pages"]
    hold(0)
    hold(num_pages)
    report["after_all"] = generate()
    hold(num_pages // 2)
    hold(num_pages)
    report["after_half"] = generate()
    core.kvcached.activation.sleep()
    report["asleep_pages"] = weights.rank.status().num_resident_pages
    report["after_sleep"] = generate()
    page = weights.rank.image.pages_tensor(num_pages // 2, 1)
    page.view(torch.int16).neg_()
    report["spoiled"] = generate()
    return report


if __name__ == "__main__":
    main()
