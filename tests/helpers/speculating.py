"""Run as a script: one vLLM engine with a draft answers prompts, and reports what was accepted.

Arguments: a model folder, and a JSON object: `speculative` (vLLM's own), further `options` of
`LLM`, `num_tokens` of each answer, and `acts`, by name, beside the first answers. `NEIGHBOUR_FLOOR`
is what a neighbour can get.
"""

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

from helpers.house import Neighbour
from helpers.offline import ENGINE_OPTIONS, mixed_prompts, resident

Plane = tuple[int, int]  # its size class, and its number among those of that size

IS_ELASTIC = os.environ.get("ENABLE_KVCACHED", "0") != "0"
MAX_PROMPT_TOKENS = 450
NUM_PROMPTS = 20
NUM_ANSWER_TOKENS = 24
NUM_STEPS_BEFORE = 4  # until something happens to requests that have drafts
WRONG = 0x42  # as a float 48.6, which attention does not pass over
COUNTS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
}
BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
PREEMPTIONS = "vllm:num_preemptions"


class Speculating:
    """An engine in this process that speculates, stepped by hand.

    Args:
        model: The target's folder.
        speculative: What vLLM takes as `speculative_config`.
        num_tokens: Of each answer.
        options: Further arguments of `LLM`.
    """

    def __init__(
        self,
        model: str,
        speculative: Any,
        *,
        num_tokens: int = NUM_ANSWER_TOKENS,
        **options: Any,
    ) -> None:
        from vllm import LLM

        sizes = {} if IS_ELASTIC else {"kv_cache_memory_bytes": 512 << 20}
        fixed = {"disable_log_stats": False, "enable_prefix_caching": False, "seed": 0}
        settings = ENGINE_OPTIONS | fixed | sizes | options
        self.llm = LLM(model, speculative_config=speculative, **settings)
        self.core: Any = self.llm.llm_engine.engine_core.engine_core
        self._num_asked, self._num_tokens = 0, num_tokens

    @property
    def worker(self) -> Any:
        return self.core.model_executor.driver_worker.worker

    def answer(self, at_step: Callable[[int], None] = lambda _: None) -> list[list[int]]:
        """Answer all prompts at once; `at_step` is called behind each step with its number."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        sampling = SamplingParams(temperature=0, max_tokens=self._num_tokens, ignore_eos=True)
        prompts = mixed_prompts(MAX_PROMPT_TOKENS)[:NUM_PROMPTS]
        names = [str(self._num_asked + index) for index in range(len(prompts))]
        self._num_asked += len(prompts)
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        tokens: dict[str, list[int]] = {}
        step = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    tokens[output.request_id] = list(output.outputs[0].token_ids)
            step += 1
            at_step(step)
        return [tokens[name] for name in names]

    def counts(self) -> dict[str, Any]:
        """Return vLLM's own counters of drafts, since the start."""
        metrics = {each.name: each for each in self.llm.get_metrics()}
        found = {name: int(metrics[key].value) for name, key in COUNTS.items()}
        return {**found, "by_position": list(metrics[BY_POSITION].values)}

    def accepted_in(self, act: Callable[[], Any]) -> list[int]:
        """Return how many drafted tokens were accepted at each position while `act` ran."""
        before = self.counts()["by_position"]
        act()
        after = self.counts()["by_position"]
        return [now - then for now, then in zip(after, before, strict=True)]

    def num_preemptions(self) -> int:
        """Return how many requests vLLM has preempted, since the start."""
        metrics = self.llm.get_metrics()
        return sum(int(each.value) for each in metrics if each.name == PREEMPTIONS)

    def planes(self) -> list[Plane]:
        """Return all planes of the KV cache."""
        classes = self.worker.kvcached.arena.geometry.classes
        return [
            (size_class, plane)
            for size_class, geometry in enumerate(classes)
            for plane in range(geometry.num_planes)
        ]

    def draft_planes(self) -> list[Plane]:
        """Return the planes of layers that are not the target's, by where their tensors begin."""
        runner = self.worker.model_runner
        of_target = {id(module) for module in runner.get_model().modules()}
        layers = runner.vllm_config.compilation_config.static_forward_context.values()
        starts = {
            _tensor(layer.kv_cache).data_ptr()
            for layer in layers
            if hasattr(layer, "kv_cache") and id(layer) not in of_target
        }
        return [plane for plane in self.planes() if self.run_address(plane, 0) in starts]

    def run_address(self, plane: Plane, page: int) -> int:
        """Return where a plane's blocks on a page begin."""
        arena = self.worker.kvcached.arena
        size_class, number = plane
        geometry = arena.geometry.classes[size_class]
        start = arena.address + arena.geometry.class_offset(size_class, arena.num_pages)
        address: int = start + page * geometry.page_bytes + geometry.plane_offset(number)
        return address

    def resident(self) -> int:
        """Return the bytes of the KV cache that are mapped; on a host the kernel says it."""
        if self.worker.device.type == "cpu":
            return resident(self.worker)
        self.worker.kvcached.keeper.wait()
        mapped: int = self.worker.kvcached.arena.resident_bytes
        return mapped

    def spoil(self, planes: Iterable[Plane]) -> None:
        """Fill all blocks of these planes with wrong values, on all pages that are mapped."""
        self.worker.kvcached.keeper.wait()
        arena = self.worker.kvcached.arena
        for page, plane in product(arena.resident_pages, planes):
            run_bytes = arena.geometry.classes[plane[0]].run_bytes
            ctypes.memset(self.run_address(plane, page), WRONG, run_bytes)


def _tensor(kv_cache: Any) -> Any:
    return kv_cache[0] if isinstance(kv_cache, list) else kv_cache


def lose_to_a_neighbour(engine: Speculating, report: dict[str, Any]) -> None:
    """Have a neighbour below its floor take memory of requests that have drafts."""
    from helpers.served import PAGE_BYTES
    from kvcached_core.config import read_config
    from kvcached_core.units import parse_bytes

    floor = os.environ["NEIGHBOUR_FLOOR"]
    settings = {name: value for name, value in os.environ.items() if name.startswith("KVCACHED")}
    own = {"KVCACHED_NAME": "neighbour", "KVCACHED_FLOOR": floor}
    neighbour = Neighbour(read_config(settings | own))
    wanted_pages = parse_bytes(floor, what="the floor") // PAGE_BYTES
    taken, drafted = 0, 0

    def take(step: int) -> None:
        nonlocal taken, drafted
        if step == NUM_STEPS_BEFORE:
            requests = engine.core.scheduler.running
            drafted = sum(bool(request.spec_token_ids) for request in requests)
        if step >= NUM_STEPS_BEFORE and taken < wanted_pages:
            taken += neighbour.take(wanted_pages - taken)

    before = engine.num_preemptions()
    report["tokens_beside_neighbour"] = engine.answer(take)
    report["num_preempted"] = engine.num_preemptions() - before
    report["num_with_draft"] = drafted
    report["taken_pages"] = taken
    neighbour.rest(taken)
    neighbour.give(taken)
    neighbour.close()


def spoil_the_draft(engine: Speculating, report: dict[str, Any]) -> None:
    """Write over the draft's blocks, and those alone, in the middle of answers."""
    _spoil(engine, report, "draft", engine.draft_planes())


def spoil_the_target(engine: Speculating, report: dict[str, Any]) -> None:
    """Write over one plane of the target's in the middle of answers."""
    first, *_ = sorted(set(engine.planes()) - set(engine.draft_planes()))
    _spoil(engine, report, "target", [first])


def _spoil(engine: Speculating, report: dict[str, Any], whose: str, planes: list[Plane]) -> None:
    def spoil(step: int) -> None:
        if step == NUM_STEPS_BEFORE:
            engine.spoil(planes)

    def answer() -> None:
        report[f"tokens_of_wrong_{whose}"] = engine.answer(spoil)

    report[f"accepted_of_wrong_{whose}"] = engine.accepted_in(answer)


def give_weights(engine: Speculating, report: dict[str, Any]) -> None:
    """Let all weights go, the draft's among them, and answer again."""
    weights = engine.worker.kvcached_weights
    weights.rank.copying.join()
    runner = engine.worker.model_runner
    drafter = getattr(runner, "drafter", None) or runner.speculator
    drafter = drafter.model
    arena = weights.rank.image.arena
    inside = range(arena.address, arena.address + arena.num_bytes)
    report["draft_weights"] = [parameter.data_ptr() in inside for parameter in drafter.parameters()]
    engine.core.kvcached.sleep()
    report["asleep_weight_pages"] = weights.rank.status().num_resident_pages

    def answer() -> None:
        report["tokens_after_sleep"] = engine.answer()

    report["accepted_after_sleep"] = engine.accepted_in(answer)


def sleep_and_wake(engine: Speculating, report: dict[str, Any]) -> None:
    """Have vLLM itself sleep and wake, and answer again."""
    engine.llm.sleep(level=1)
    report["asleep_bytes"] = engine.resident()
    engine.llm.wake_up()

    def answer() -> None:
        report["tokens_after_wake"] = engine.answer()

    report["accepted_after_wake"] = engine.accepted_in(answer)


ACTS = {
    act.__name__: act
    for act in (
        lose_to_a_neighbour,
        spoil_the_draft,
        spoil_the_target,
        give_weights,
        sleep_and_wake,
    )
}


def main() -> None:
    """Start, answer, do what is asked, and report one JSON object on the last line."""
    options = json.loads(sys.argv[2])
    words = options.get("options", {})
    if "num_tokens" in options:
        words["num_tokens"] = options["num_tokens"]
    engine = Speculating(sys.argv[1], options["speculative"], **words)
    report: dict[str, Any] = {"tokens": engine.answer(), "counts": engine.counts()}
    if IS_ELASTIC:
        report["planes"] = engine.planes()
        report["page_bytes"] = engine.core.kvcached.geometry.page_bytes
        report["after_last"] = engine.resident()
        report["draft_planes"] = engine.draft_planes()
    for name in options.get("acts", ()):
        ACTS[name](engine, report)
    if IS_ELASTIC:
        report["at_the_end"] = engine.resident()
    print("\n" + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
