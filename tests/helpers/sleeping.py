"""Run as a script: one vLLM engine in this process sleeps, is refused a wake, and wakes.

A CPU has no sleep mode, so what vLLM's allocator would hold asleep is entered into its table. The
rest is real: the engine's pause, its scheduler, our wake and the ledger.
"""

import json
import sys
from typing import Any

from offline import ENGINE_OPTIONS

ASLEEP_BYTES = 300 << 20
PROMPT = list(range(5, 205))


def main() -> None:
    """Sleep and wake twice, report one JSON object on the last line."""
    from vllm import LLM, SamplingParams
    from vllm.device_allocator import AllocationData
    from vllm.device_allocator.cumem import CuMemAllocator

    from kvcached_core.engine import ranks

    ranks.PATIENCE_SECONDS = 0.2
    llm = LLM(sys.argv[1], **ENGINE_OPTIONS)
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    report: dict[str, Any] = {"tokens": answer(llm, sampling), "rounds": []}
    allocator = CuMemAllocator.instance = CuMemAllocator()
    for level in (1, 2):
        llm.sleep(level)
        weights = AllocationData((0, ASLEEP_BYTES, 1, 0), "weights")
        if hasattr(weights, "is_asleep"):
            weights.is_asleep = True
        allocator.pointer_to_data = {1: weights}
        instance = neighbour(core.kvcached)
        seen: dict[str, Any] = {"refusal": None}
        try:
            llm.wake_up()
        except MemoryError as error:
            seen["refusal"] = str(error)
        engine.add_request(str(level), {"prompt_token_ids": PROMPT}, sampling)
        seen["asleep_outputs"] = [repr(one) for _ in range(5) for one in engine.step()]
        seen["is_sleeping"] = core.is_sleeping()
        instance.close()
        llm.wake_up()
        (ledger,) = core.kvcached.instance._ledgers.values()
        seen["announced_bytes"] = [row.static_bytes for row in ledger.view().instances]
        outputs: list[Any] = []
        while not outputs:
            outputs = [one for one in engine.step() if one.finished]
        seen["tokens"] = list(outputs[0].outputs[0].token_ids)
        report["rounds"].append(seen)
    print(json.dumps(report))


def answer(llm: Any, sampling: Any) -> list[int]:
    """Return the tokens of a request."""
    outputs = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    return list(outputs[0].outputs[0].token_ids)


def neighbour(engine: Any) -> Any:
    """Return an instance that was promised all that is free."""
    from kvcached_core.config import read_config
    from kvcached_core.engine.instance import Instance

    instance = Instance(
        engine.devices,
        read_config(),
        name="neighbour",
        default_name="neighbour",
        engine="test",
        on_ring=lambda: None,
    )
    instance.describe(page_bytes=engine.geometry.page_bytes, num_pages=64)
    instance.promise(64, is_urgent=False)
    return instance


if __name__ == "__main__":
    main()
