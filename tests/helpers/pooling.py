"""Run as a script: a vLLM engine that embeds or judges texts, and reports what it makes of them.

Arguments: a model folder, and a JSON object: `task` (a name in `TASKS`), and `options` of `LLM`.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

PROMPTS = [[5 + index] * (8 + 3 * index) for index in range(6)]
QUERY = "w9 w8 w7"
DOCUMENTS = [" ".join(f"w{5 + index}" for _ in range(8 + 3 * index)) for index in range(6)]


def embed(llm: Any) -> list[list[float]]:
    """Return a vector for each prompt."""
    return [each.outputs.embedding for each in llm.embed(_requests())]


def classify(llm: Any) -> list[list[float]]:
    """Return the probability of each label, for each prompt."""
    return [each.outputs.probs for each in llm.classify(_requests())]


def score(llm: Any) -> list[list[float]]:
    """Return how well each document answers the query."""
    return [[each.outputs.score] for each in llm.score(QUERY, DOCUMENTS)]


TASKS: dict[str, Callable[[Any], list[list[float]]]] = {
    each.__name__: each for each in (embed, classify, score)
}


def _requests() -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": prompt} for prompt in PROMPTS]


def main() -> None:
    """Start, ask twice, report one JSON object on the last line."""
    options = json.loads(sys.argv[2])
    elastic = os.environ.get("ENABLE_KVCACHED", "0") != "0"
    sizes = {} if elastic else {"kv_cache_memory_bytes": 64 << 20}
    from vllm import LLM

    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    settings |= sizes | options.get("options", {})
    llm = LLM(sys.argv[1], runner="pooling", **settings)
    task = TASKS[options.get("task", "embed")]
    report: dict[str, Any] = {"vectors": [task(llm) for _ in range(2)]}
    core = llm.llm_engine.engine_core.engine_core
    report["is_elastic"] = bool(getattr(core, "kvcached", 0))
    if report["is_elastic"]:
        from helpers.offline import resident

        worker = core.model_executor.driver_worker.worker
        report["page_bytes"] = core.kvcached.geometry.page_bytes
        llm.reset_prefix_cache()
        report["resident"] = resident(worker)
    print("\n" + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
