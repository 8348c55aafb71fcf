"""Run as a script: two vLLM engines whose weights do not fit together answer in turn; it reports.

Arguments: a model folder, and a JSON object with `other`, another one, and `num_requests`.
"""

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kvcached_core.ledger.survey import survey

NUM_PROMPTS = 10
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 96,
    "block_size": 32,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
}


class Asked:
    """An engine in a process of its own, and what it answers while it is alone."""

    def __init__(self, model: str) -> None:
        from vllm import LLM, SamplingParams

        self.llm = LLM(model, **OPTIONS)
        self._sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        self.expected = [self.ask(number) for number in range(NUM_PROMPTS)]

    def ask(self, number: int) -> list[int]:
        """Return what it answers to one prompt."""
        number %= NUM_PROMPTS
        prompt = {"prompt_token_ids": [3 + (37 * number + index) % 490 for index in range(20)]}
        (output,) = self.llm.generate([prompt], self._sampling, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    def is_right(self, number: int) -> bool:
        """Ask, and return whether the answer is what it was."""
        return self.ask(number) == self.expected[number % NUM_PROMPTS]


def die_while_waking(worker: Any) -> None:
    """Have a worker killed when the third page of its weights comes back."""
    image = getattr(worker, "worker", worker).kvcached_weights.rank.image
    map_next = image.map_next

    def map_or_die(num_pages: int) -> None:
        if image.num_resident_pages >= 2:
            os.kill(os.getpid(), signal.SIGKILL)
        map_next(num_pages)

    image.map_next = map_or_die


def main() -> None:
    """Start one after the other, ask them in turn, report one JSON object on the last line."""
    first, options = sys.argv[1], json.loads(sys.argv[2])
    engines = [Asked(first), Asked(options["other"])]
    num_requests = options["num_requests"]
    report: dict[str, Any] = {"differ": engines[0].expected != engines[1].expected}
    report["right"] = [engines[one % 2].is_right(one) for one in range(num_requests)]
    with ThreadPoolExecutor(2) as threads:  # both want memory at once
        asked = [threads.submit(each_right, engine, 5) for engine in engines]
        report["right_at_once"] = [right for one in asked for right in one.result()]
    report |= seen()
    report |= killed(engines, options["other"])
    print(json.dumps(report), flush=True)
    os._exit(0)  # the engine that was killed cannot be shut down


def each_right(engine: Asked, num_requests: int) -> list[bool]:
    """Return for each of some requests whether it was answered right."""
    return [engine.is_right(number) for number in range(num_requests)]


def seen() -> dict[str, Any]:
    """Return what the ledger says of the engines."""
    (device,) = survey(Path(os.environ["KVCACHED_DIR"])).devices
    rows = device.instances
    return {
        "pool_bytes": device.capacity_bytes,
        "resident_bytes": sum(row.resident_bytes for row in rows),
        "weights_needed_bytes": [row.weights_needed_bytes for row in rows],
        "num_activations": [row.activations.num for row in rows],
    }


def killed(engines: list[Asked], model: str) -> dict[str, Any]:
    """Return what becomes of both when the second is killed while its weights come back."""
    engines[1].llm.collective_rpc(die_while_waking)
    engines[0].ask(0)  # takes the other one's weights
    try:
        engines[1].ask(0)
        died = False
    except Exception:  # noqa: BLE001  vLLM's own word for it
        died = True
    right = [engines[0].is_right(number) for number in range(4)]
    again = Asked(model)
    return {
        "died": died,
        "right_after_kill": right,
        "started_again": again.expected == engines[1].expected,
        "right_in_the_end": [
            engine.is_right(number) for number in range(3) for engine in (engines[0], again)
        ],
    }


if __name__ == "__main__":
    main()
