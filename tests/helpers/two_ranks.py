"""Run as a script: one vLLM engine with two ranks answers mixed prompts and reports.

Argument: a model folder. Its last line is a JSON object.
"""

import json
import os
import sys
from typing import Any

from helpers.offline import ENGINE_OPTIONS, mixed_prompts


def main() -> None:
    """Start, generate, report."""
    elastic = os.environ.get("ENABLE_KVCACHED", "0") != "0"

    from vllm import LLM, SamplingParams

    sizes = {} if elastic else {"kv_cache_memory_bytes": 256 << 20}
    llm = LLM(
        sys.argv[1],
        **ENGINE_OPTIONS,
        tensor_parallel_size=2,
        enable_prefix_caching=False,
        **sizes,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in mixed_prompts()]
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    report: dict[str, Any] = {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
    if elastic:
        from kvcached_vllm.worker import resident_pages

        core = llm.llm_engine.engine_core.engine_core
        report["pages"] = core.model_executor.collective_rpc(resident_pages)
        report["page_bytes"] = core.kvcached.geometry.page_bytes
        (ledger,) = core.kvcached.instance._ledgers.values()
        report["view"] = [vars(view) for view in ledger.view().instances]
    print("\n" + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
