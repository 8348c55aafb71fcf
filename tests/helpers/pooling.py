"""Run as a script: a vLLM engine that embeds texts, and reports the vectors.

Arguments: a model folder, and a JSON object: `options` of `LLM`.
"""

import json
import os
import sys
from typing import Any

PROMPTS = [[5 + index] * (8 + 3 * index) for index in range(6)]


def main() -> None:
    """Start, embed twice, report one JSON object on the last line."""
    options = json.loads(sys.argv[2]).get("options", {})
    elastic = os.environ.get("ENABLE_KVCACHED", "0") != "0"
    sizes = {} if elastic else {"kv_cache_memory_bytes": 64 << 20}
    from vllm import LLM

    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    llm = LLM(sys.argv[1], runner="pooling", **settings, **sizes, **options)
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    rounds = [[output.outputs.embedding for output in llm.embed(prompts)] for _ in range(2)]
    core = llm.llm_engine.engine_core.engine_core
    report: dict[str, Any] = {"vectors": rounds, "is_elastic": bool(getattr(core, "kvcached", 0))}
    if report["is_elastic"]:
        from helpers.offline import resident

        worker = core.model_executor.driver_worker.worker
        report["page_bytes"] = core.kvcached.geometry.page_bytes
        llm.reset_prefix_cache()
        report["resident"] = resident(worker)
    print("\n" + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
