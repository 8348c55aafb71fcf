"""Run as a script: one vLLM engine in this process whose weights arrive layer by layer; it reports.

Copies are never done before somebody waits for them, so a step that begins at all begins before
they end. Arguments: a model folder, and a JSON object: with `vanilla` it answers once.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from lazy_copies import LazyHostBackend

from kvcached_core.memory import torch_device
from kvcached_core.weights import arriving
from kvcached_core.weights.arriving import Arriving

OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "block_size": 32,
    "enable_prefix_caching": False,
}
NUM_AHEAD = 2  # pages
PROMPTS = [[5 + index] * (20 + 30 * index) for index in range(6)]


def main() -> None:
    """Start, let weights arrive in all ways, and report one JSON object on the last line."""
    model, options = sys.argv[1], json.loads(sys.argv[2])
    from vllm import LLM, SamplingParams

    torch_device.HostBackend = LazyHostBackend  # type: ignore[misc]  the engine makes its own
    more: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20} if options.get("vanilla") else {}
    llm = LLM(model, dtype="float32", **OPTIONS, **more)
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]

    def tokens() -> list[list[int]]:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    report: dict[str, Any] = {"tokens": tokens()}
    if not options.get("vanilla"):
        report |= arrive(llm, tokens, report["tokens"])
    print(json.dumps(report))


def weight_sum(worker: Any) -> float:
    """Return a number of all weights, as something that reads them beside a step."""
    model = getattr(worker, "worker", worker).model_runner.get_model()
    return sum(float(one.detach().double().sum()) for one in model.parameters())


def arrive(llm: Any, tokens: Callable[[], Any], first: Any) -> dict[str, Any]:
    """Return what became of the answers, and when the layers began."""
    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    engine, weights = core.kvcached, worker.kvcached_weights
    rank, layers = weights.rank, worker.model_runner.get_model().model.layers
    rank.copying.join()  # the copy is made behind the start
    backend = rank.image.backend
    begun: list[int] = []

    def note(*_: Any) -> None:
        begun.append(backend.num_open)

    handles = [layer.register_forward_pre_hook(note) for layer in layers]

    def woken(num_kept: int = 0) -> dict[str, Any]:
        """Answer on weights that come for it; return how much was on its way at each layer."""
        engine.sleep()
        if num_kept:
            rank.hold(num_kept)
            rank.arriving.finish()
            engine.activation._status = rank.status()
        begun.clear()
        answer = tokens()
        return {
            "is_same": answer == first,
            "open": begun[: len(layers)],
            "is_over": not any(begun[-1:]),
        }

    report: dict[str, Any] = {
        "num_pages": rank.image.num_pages,
        "is_trusted": not weights.walks.is_due,
        "from_nothing": woken(),
        "from_half": woken(rank.image.num_pages // 2),
    }
    engine.sleep()
    engine.activation.activate_now()
    report["open_after_a_wake_by_hand"] = backend.num_open
    engine.sleep()
    engine.activation.activate()
    report["open_after_a_wake"] = backend.num_open
    engine.sleep()  # again, while they are on their way
    report["open_after_a_sleep"] = [backend.num_open, rank.image.num_resident_pages]
    engine.activation.activate()
    before = llm.collective_rpc(weight_sum)
    report["is_read_whole"] = before == llm.collective_rpc(weight_sum)
    report["same_afterwards"] = tokens() == first

    ahead_bytes, arriving.AHEAD_BYTES = arriving.AHEAD_BYTES, NUM_AHEAD * rank.image.page_bytes
    report["from_a_few"] = woken()
    engine.sleep()
    engine.activation.activate()
    report["open_of_a_few"] = backend.num_open
    report["unbegun"] = rank.arriving.num_unbegun
    engine.activation.rest()  # the request was taken back: no step comes
    report["left_at_rest"] = [backend.num_open, rank.arriving.num_unbegun]
    report["same_after_a_few"] = tokens() == first
    arriving.AHEAD_BYTES = ahead_bytes

    LazyHostBackend.is_broken = True
    report["refused_waits"] = woken()
    LazyHostBackend.is_broken = False

    for handle in handles:
        handle.remove()
    report["waits_left_out_differ"] = without_waits(engine, tokens) != first
    report["same_at_last"] = woken()["is_same"]
    return report


def without_waits(engine: Any, tokens: Callable[[], Any]) -> Any:
    """Plant a defect: no layer waits for what it needs."""
    engine.sleep()
    wait, Arriving.wait = Arriving.wait, lambda *_: None  # type: ignore[method-assign]
    try:
        with torch.inference_mode():
            return tokens()
    finally:
        Arriving.wait = wait  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
