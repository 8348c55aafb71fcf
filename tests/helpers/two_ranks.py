"""Run as a script: one vLLM engine with two ranks answers mixed prompts and reports.

Arguments: a model folder and a JSON object: `gpu`, and further arguments of `LLM`, such as
`{"gpu": true, "pipeline_parallel_size": 2}`. The report is a JSON object in a line of its own.
"""

import json
import os
import sys
from dataclasses import asdict
from typing import Any

from helpers.offline import ENGINE_OPTIONS, MAX_SHORT_TOKENS, mixed_prompts, resident_pages

CPU_ENGINE = ENGINE_OPTIONS | {"tensor_parallel_size": 2}
GPU_ENGINE = {"load_format": "dummy", "dtype": "bfloat16", "max_model_len": 4096, "seed": 0}
MIB = 1 << 20


def wait_for_copy(worker: Any) -> None:
    """Return when a rank's weights are in host memory, or cannot be."""
    getattr(worker, "worker", worker).kvcached_weights.rank.copying.join()


def num_weight_pages(worker: Any) -> int:
    """Return how many pages of a rank's weights are there."""
    return int(getattr(worker, "worker", worker).kvcached_weights.rank.status().num_resident_pages)


def main() -> None:
    """Start, generate, report."""
    elastic = os.environ.get("ENABLE_KVCACHED", "0") != "0"
    options = json.loads(sys.argv[2])
    on_gpus = options.pop("gpu", False)

    from vllm import LLM, SamplingParams

    sizes: dict[str, Any] = {}
    if not elastic and not on_gpus:
        sizes = {"kv_cache_memory_bytes": 256 * MIB}
    elif not elastic:
        sizes = {"kv_cache_memory_bytes": 2048 * MIB, "gpu_memory_utilization": 0.05}
    engine: dict[str, Any] = (GPU_ENGINE if on_gpus else CPU_ENGINE) | options
    llm = LLM(sys.argv[1], **engine, enable_prefix_caching=False, **sizes)
    core = llm.llm_engine.engine_core.engine_core
    if on_gpus:
        from helpers.gpu_offline import give_weights

        core.model_executor.collective_rpc(give_weights)
    prompts = [{"prompt_token_ids": prompt} for prompt in mixed_prompts(MAX_SHORT_TOKENS)]
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

    def tokens() -> list[list[int]]:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    report: dict[str, Any] = {"tokens": tokens()}
    if elastic and core.kvcached.yields_weights:
        core.model_executor.collective_rpc(wait_for_copy)
        core.kvcached.sleep()
        report["asleep_pages"] = core.model_executor.collective_rpc(num_weight_pages)
        report["tokens_after_sleep"] = tokens()
        report["awake_pages"] = core.model_executor.collective_rpc(num_weight_pages)
    if elastic:
        report["pages"] = core.model_executor.collective_rpc(resident_pages)
        report["page_bytes"] = core.kvcached.geometry.page_bytes
        ledgers = core.kvcached.instance._ledgers.values()
        report["view"] = [asdict(view) for ledger in ledgers for view in ledger.view().instances]
    print("\n" + json.dumps(report), flush=True)
    if on_gpus:
        os._exit(0)  # workers on GPUs take seconds to tear down; their parent's end ends them


if __name__ == "__main__":
    main()
