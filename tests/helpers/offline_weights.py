"""Run as a script: one vLLM engine in this process, whose weights go and come; it reports.

Arguments: a model folder, and a JSON object: with `vanilla` it answers once and reports that, with
`tamper` it runs a step on weights that are not there, with `adapter`, a folder, it answers through
it, too, and reports that alone. With `buffers`, a size in bytes, buffers of that size and more go
with the weights, and it reports what became of them alone.
"""

import ctypes
import json
import queue
import sys
from typing import Any

import torch
from adapter import RANK

from kvcached_core.engine.weights_kept import WeightsKept
from kvcached_core.weights import scratch

OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "block_size": 32,
    "enable_prefix_caching": False,
}
PROMPTS = [[5 + index] * (20 + 30 * index) for index in range(6)]


def change(worker: Any) -> None:
    """Write to weights in their place, as a trainer does: the likely becomes unlikely."""
    with torch.inference_mode():
        last_norm(worker).weight.mul_(-1)


def replace(worker: Any) -> None:
    """Put another parameter in the place of one."""
    norm = last_norm(worker)
    norm.weight = torch.nn.Parameter(norm.weight.detach().clone() * -1, requires_grad=False)


def last_norm(worker: Any) -> Any:
    """Return what every answer goes through."""
    return getattr(worker, "worker", worker).model_runner.get_model().model.norm


def main() -> None:
    """Start, let weights go and come in all ways, and report one JSON object on the last line."""
    model, options = sys.argv[1], json.loads(sys.argv[2])
    from vllm import LLM, SamplingParams

    more: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20} if options.get("vanilla") else {}
    adapter = options.get("adapter")
    if adapter:
        more = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}
    scratch.LEAST_SCRATCH_BYTES = options.get("buffers", scratch.LEAST_SCRATCH_BYTES)
    llm = LLM(options.get("model", model), dtype="float32", **OPTIONS, **more)
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]

    def tokens(lora: Any = None) -> list[list[int]]:
        outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
        return [list(output.outputs[0].token_ids) for output in outputs]

    if adapter:
        print(json.dumps(through_adapter(llm, tokens, adapter)))
        return
    if options.get("buffers"):
        print(json.dumps(with_buffers(llm, tokens)))
        return
    report: dict[str, Any] = {"tokens": tokens()}
    if options.get("tamper"):
        step_on_dropped_weights(llm, tokens)
    if not options.get("vanilla"):
        report |= come_and_go(llm, tokens, report["tokens"])
    print(json.dumps(report))


def through_adapter(llm: Any, tokens: Any, folder: str) -> dict[str, Any]:
    """Return what became of answers with and without an adapter while weights went and came."""
    from vllm.lora.request import LoRARequest

    core = llm.llm_engine.engine_core.engine_core
    weights = core.model_executor.driver_worker.worker.kvcached_weights
    first, second = LoRARequest("first", 1, folder), LoRARequest("second", 2, folder)
    plain, adapted = tokens(), tokens(first)
    weights.rank.copying.join()

    def slept(lora: Any = None) -> Any:
        core.kvcached.sleep()
        assert weights.rank.image.num_resident_pages == 0
        return tokens(lora)

    report = {
        "differ": plain != adapted,
        "same": [slept() == plain, slept(first) == adapted, slept() == plain],
    }
    core.kvcached.sleep()
    report["is_added"] = llm.llm_engine.add_lora(second)
    report["same"] += [slept(second) == adapted, slept(first) == adapted]
    report["is_shared"] = weights.rank.copying.copy.is_shared  # no page of the weights was written
    return report


def with_buffers(llm: Any, tokens: Any) -> dict[str, Any]:
    """Return what became of answers while buffers went and came, and when one was spoiled."""
    core = llm.llm_engine.engine_core.engine_core
    weights = core.model_executor.driver_worker.worker.kvcached_weights
    annex, rank = weights.annex.annex, weights.rank
    first = tokens()
    rank.copying.join()
    core.input_queue = queue.SimpleQueue()  # as if it had a loop: only such engines offer weights
    report: dict[str, Any] = {"tokens": first, "num_bytes": annex.num_bytes, "same": []}

    def note() -> None:
        status = rank.status()
        image = rank.image
        row = core.model_executor.driver_worker.worker.kvcached.ledger.view().instances[0]
        report.setdefault("held", []).append(
            [
                annex.resident_bytes,
                image.num_pages - image.num_resident_pages,
                status.num_pages - status.num_resident_pages,
                (status.num_resident_pages * image.page_bytes) - row.weights_bytes,
            ]
        )

    for num_pages in (1, 1 << 20):  # buffers go first, then weights
        core.kvcached.rest()
        core.kvcached.activation.give(num_pages * rank.image.page_bytes)
        note()
        report["same"].append(tokens() == first)
        note()
    core.kvcached.sleep()
    kept = [(span, first, last) for span in annex._spans.values() for first, last, _ in span.kept]
    report["same"].append(tokens() == first)
    for run in kept:
        annex._units(run)[0] = 0
    report["spoiled_differs"] = tokens() != first
    return report


def step_on_dropped_weights(llm: Any, tokens: Any) -> None:
    """Plant a defect: a schedule does not look whether weights are there."""
    core = llm.llm_engine.engine_core.engine_core
    core.model_executor.driver_worker.worker.kvcached_weights.rank.copying.join()
    core.kvcached.sleep()
    core.kvcached.giving.weights = WeightsKept()
    print(json.dumps({"is_asleep": True}), flush=True)
    tokens()


def come_and_go(llm: Any, tokens: Any, first: list[list[int]]) -> dict[str, Any]:
    """Return what became of the answers."""
    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    engine, weights = core.kvcached, worker.kvcached_weights
    image, rank = weights.rank.image, weights.rank
    rank.copying.join()  # the copy is made behind the start
    core.input_queue = queue.SimpleQueue()  # as if it had a loop: only such engines offer weights
    row = worker.kvcached.ledger.view
    report: dict[str, Any] = {
        "num_pages": image.num_pages,
        "bound_bytes": weights.adopted.binding.bound_bytes,
        "static_bytes": weights.adopted.binding.static_bytes,
    }

    def resident() -> int:
        return sum(one.weights_bytes for one in row().instances) // image.page_bytes

    def slept() -> Any:
        engine.sleep()
        assert image.num_resident_pages == 0
        return tokens()

    steps = []
    for num_kept in range(image.num_pages + 1):
        engine.rest()
        given = engine.activation.give((image.num_pages - num_kept) * image.page_bytes)
        seen = (image.num_resident_pages, resident(), given // image.page_bytes)
        steps.append([*seen, tokens() == first, resident()])
    report["steps"] = steps
    report["slept"] = slept() == first
    llm.sleep(level=1)
    report["asleep_pages"] = image.num_resident_pages
    llm.wake_up()
    report["woken_pages"] = image.num_resident_pages
    report["after_wake_up"] = tokens() == first

    llm.collective_rpc(change)
    changed = tokens()
    report["changed_differs"] = changed != first
    report["changed_slept"] = slept() == changed
    engine.sleep()
    llm.collective_rpc(change)  # twice is as before; it wakes the weights first
    report["changed_while_dropped"] = tokens() == first
    report["changed_back_slept"] = slept() == first
    llm.collective_rpc(replace)
    report["replaced"] = tokens() == changed
    report["replaced_slept"] = slept() == changed
    engine.sleep()
    llm.collective_rpc("reload_weights")
    report["reloaded"] = tokens() == first
    report["reloaded_slept"] = slept() == first

    engine.sleep()
    address = rank.copying.copy.page_address(0)  # with the embedding
    ctypes.memset(address, 1, image.page_bytes // 2)
    report["wrong_page_is_seen"] = tokens() != first
    return report


if __name__ == "__main__":
    main()
