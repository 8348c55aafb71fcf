"""Many models behind the URL of `kvcached serve`, on one GPU or two.

    python benchmarks/gateway_gpu.py --json benchmarks/results/gpu/gateway_gpu_h200.json
    python benchmarks/gateway_gpu.py --json FILE --cards 2 --models 3 --parts move

Servers of one shape with weights of their own, more than the device has room for at a time, start
by their first request. `bursts` asks them in bursts, of which two at most overlap. `classes` sends
one schedule twice: without classes, and with a strict one and a loose one, which a reload brings.
`move` loads two models of one GPU until one moves to the other. `--tiny` rehearses on a CPU.
"""

import argparse
import asyncio
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gateway_client import Answer, send
from gateway_schedule import Due, bursts, num_overlapping, prompt, rivals
from gateway_serve import CHUNK_TOKENS, Gateway
from gateway_table import table
from machine import describe_gpu, describe_machine
from vllm_servers import Record

from kvcached_core.units import GIB

PARTS = ("bursts", "classes", "move")
NUM_PROMPTS, PROMPT_TOKENS, NUM_TOKENS = 4, 256, 16
STRICT_TOKENS, LOOSE_TOKENS = 1000, 1900
NUM_GAUGES = 12  # requests that tell what the device reads
GOAL_PROMPTS = 15  # the strict goal, as times of reading one of its prompts
LOOSE_SECONDS = 30.0
TINY_KV_BYTES = 2 * GIB  # for the prompts of `classes`
COPY_SECONDS, MOVE_SECONDS = 60.0, 120.0
MOVE_RATE = 6.0  # requests a second at each of two models
PROMPTS = tuple(prompt(1000 + number, PROMPT_TOKENS) for number in range(NUM_PROMPTS))


class Run:
    """A gateway, and what became of the requests to it."""

    def __init__(self, gateway: Gateway, record: Record, options: argparse.Namespace) -> None:
        self._gateway = gateway
        self._record = record
        self._options = options
        self._right: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        self.names: list[str] = []
        self.num_failed = 0

    def _send(self, schedule: Sequence[Due]) -> list[Answer]:
        answers = asyncio.run(send(self._gateway.url, schedule))
        failed = [answer.error for answer in answers if answer.error]
        self.num_failed += len(failed)
        self._record.add(failed=self.num_failed)
        if failed:
            errors = self._record.results.get("errors", [])
            self._record.add(errors=(errors + failed)[:20])
        return answers

    def start(self) -> None:
        """Start every model by its first request, all at once; keep those that are up in time."""
        begin = time.monotonic()
        first = [Due(0.0, name, PROMPTS[0], NUM_TOKENS) for name in self._gateway.names]
        answers = asyncio.run(self._send_first(first))
        rows = {row.id: row for row in self._gateway.client.models()}
        self.names = [answer.due.model for answer in answers if not answer.error]
        self._record.add(
            start={
                "seconds": time.monotonic() - begin,
                "first_tokens_seconds": {one.due.model: one.ttft_seconds for one in answers},
                "start_seconds": {name: row.start_seconds for name, row in rows.items()},
                "errors": [answer.error for answer in answers if answer.error],
            }
        )
        if len(self.names) < len(self._gateway.names):
            self._gateway.names = self.names
            self._gateway.write()
            print(self._gateway.client.reload())
        self._know()
        self._record.add(copied_seconds=self._await_copies())

    async def _send_first(self, first: Sequence[Due]) -> list[Answer]:
        sending = [asyncio.create_task(send(self._gateway.url, [due])) for due in first]
        done, late = await asyncio.wait(sending, timeout=self._options.start_seconds)
        for task in late:
            task.cancel()
        return [
            task.result()[0] if task in done else Answer(due, error="it was not up in time")
            for task, due in zip(sending, first, strict=True)
        ]

    def _know(self) -> None:
        """Ask each model each prompt alone: these are its right answers."""
        for words in PROMPTS:
            for answer in self._send([Due(0.0, name, words, NUM_TOKENS) for name in self.names]):
                self._right[answer.due.model, words] = answer.token_ids
        every = [tuple(tokens) for tokens in self._right.values()]
        self._record.add(models=len(self.names), different_answers=len(set(every)), of=len(every))

    def _await_copies(self) -> float:
        begin = time.monotonic()
        while not self._gateway.are_copied() and time.monotonic() - begin < COPY_SECONDS:
            time.sleep(0.1)
        return time.monotonic() - begin

    def bursts(self) -> None:
        """Send bursts; then ask each model alone again."""
        schedule = bursts(
            self.names,
            PROMPTS,
            num_requests=self._options.requests,
            num_in_burst=20,
            num_tokens=NUM_TOKENS,
        )
        begin = time.monotonic()
        answers = self._send(schedule)
        seconds = time.monotonic() - begin
        alone = self._send([Due(0.0, name, PROMPTS[0], NUM_TOKENS) for name in self.names])
        times = sorted(one.ttft_seconds for one in answers if one.ttft_seconds is not None)
        self._record.add(
            bursts={
                "requests": len(answers),
                "seconds": seconds,
                "failed": sum(bool(answer.error) for answer in answers),
                "overlapping": num_overlapping(schedule),
                "woken": dict(Counter(answer.woken or "no" for answer in answers)),
                "late_seconds": max(answer.late_seconds for answer in answers),
                "ttft_seconds": times,
                "same_tokens": sum(self._is_right(answer) for answer in answers),
                "same_first_token": sum(self._is_right(answer, 1) for answer in answers),
                "of_another_model": sum(map(self._is_of_another, answers)),
                "wrong_alone": sum(not self._is_right(answer) for answer in alone),
                "activations": sum(
                    row.activations.num for row in self._gateway.instances().values()
                ),
                "starts": {row.id: row.num_starts for row in self._gateway.client.models()},
            }
        )

    def _is_right(self, answer: Answer, num_tokens: int = NUM_TOKENS) -> bool:
        right = self._right[answer.due.model, answer.due.prompt]
        return answer.token_ids[:num_tokens] == right[:num_tokens]

    def _is_of_another(self, answer: Answer) -> bool:
        """Whether another model says just this, and the one that was asked does not."""
        return not self._is_right(answer) and any(
            answer.token_ids == tokens
            for (name, words), tokens in self._right.items()
            if words == answer.due.prompt and name != answer.due.model
        )

    def classes(self) -> None:
        """Send one schedule without classes and with them."""
        strict, loose = self.names[:2]
        speed = min(self._gauge(name) for name in (strict, loose))
        goal = GOAL_PROMPTS * STRICT_TOKENS / speed
        schedule = rivals(
            strict,
            loose,
            tokens_per_second=speed,
            seconds=self._options.seconds,
            strict_tokens=STRICT_TOKENS,
            loose_tokens=LOOSE_TOKENS,
        )
        goals = {strict: goal, loose: LOOSE_SECONDS}
        found: dict[str, Any] = {"tokens_per_second": speed, "goals_seconds": goals}
        for way in ("without", "with"):
            if way == "with":
                self._gateway.write(
                    {
                        "strict": {"ttft": f"{int(goal * 1e3)}ms"},
                        "loose": {"ttft": f"{LOOSE_SECONDS:g}s"},
                    },
                    {strict: "strict", loose: "loose"},
                )
                found["reload"] = self._gateway.client.reload()
            answers = self._send(schedule)
            found[way] = {
                kind: self._attained([one for one in answers if one.due.model == name], goals[name])
                for kind, name in (("strict", strict), ("loose", loose))
            }
            self._record.add(classes=found)
        found["gained"] = {
            kind: found["with"][kind]["attained"] - found["without"][kind]["attained"]
            for kind in ("strict", "loose")
        }
        self._record.add(classes=found)
        self._gateway.write()
        self._gateway.client.reload()

    def _attained(self, answers: Sequence[Answer], goal_seconds: float) -> dict[str, Any]:
        return {
            "requests": len(answers),
            "failed": sum(bool(answer.error) for answer in answers),
            "attained": sum(one.is_within(goal_seconds) for one in answers) / len(answers),
            "ttft_seconds": [answer.ttft_seconds for answer in answers],
        }

    def _gauge(self, name: str) -> float:
        """Return how many tokens a second a model reads when it has the device to itself."""
        words = [prompt(500 + number, STRICT_TOKENS) for number in range(NUM_GAUGES)]
        self._send([Due(0.0, name, words[0], 4)])  # it is awake
        begin = time.monotonic()
        self._send([Due(0.0, name, each, 4) for each in words])
        return NUM_GAUGES * STRICT_TOKENS / (time.monotonic() - begin)

    def move(self) -> None:
        """Load two models that share a GPU until one has moved to the other GPU."""
        before = self._places()
        here = Counter(before.values()).most_common(1)[0][0]
        pair = [name for name, place in before.items() if place == here][:2]
        answers: list[Answer] = []
        begin, after, rounds = time.monotonic(), before, 0
        while time.monotonic() - begin < MOVE_SECONDS and rounds < 2:  # noqa: PLR2004  one behind it
            answers += self._send(
                [
                    Due(number / MOVE_RATE, name, PROMPTS[number % NUM_PROMPTS], 4 * NUM_TOKENS)
                    for number in range(int(5 * MOVE_RATE))
                    for name in pair
                ]
            )
            after = self._places()
            rounds += after != before
        self._record.add(
            move={
                "pair": pair,
                "before": before,
                "after": after,
                "moved": sum(after[name] != before[name] for name in before),
                "seconds": time.monotonic() - begin,
                "requests": len(answers),
                "failed": sum(bool(answer.error) for answer in answers),
                "ttft_seconds": sorted(answer.ttft_seconds or 0.0 for answer in answers),
            }
        )

    def _places(self) -> dict[str, str]:
        return {row.id: ",".join(row.devices) for row in self._gateway.client.models()}

    def close(self) -> None:
        """Write down what the gateway decided."""
        decisions = self._gateway.client.decisions()
        kept = [asdict(one) for one in decisions if one.verb != "wait"][-60:]
        self._record.add(decisions=kept, verbs=dict(Counter(one.verb for one in decisions)))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="rehearse on vLLM's CPU engine")
    parser.add_argument("--parts", default="bursts,classes", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--models", type=int, default=6)
    parser.add_argument("--cards", type=int, default=1)
    parser.add_argument("--device-gib", type=float, default=80.0)
    parser.add_argument("--requests", type=int, default=1000, help="of the bursts")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the load with classes")
    parser.add_argument("--start-seconds", type=float, default=900.0, help="for all starts")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    record = Record(options.json)
    machine = describe_machine() if options.tiny else describe_gpu()
    record.add(machine=machine, chunk_tokens=CHUNK_TOKENS)
    headroom = 0 if options.tiny else int(str(machine["gpu_bytes"])) - int(options.device_gib * GIB)
    gateway = Gateway(
        options.models,
        cards=options.cards,
        tiny=options.tiny,
        headroom_bytes=headroom,
        tiny_kv_bytes=TINY_KV_BYTES if "classes" in options.parts else 0,
    )
    try:
        with gateway.serving():
            run = Run(gateway, record, options)
            try:
                run.start()
                for part in options.parts.split(","):
                    getattr(run, part)()
            finally:
                run.close()
    finally:
        gateway.keep_logs(options.json.parent, options.json.stem)
        gateway.close()
    print(table(record.results))


if __name__ == "__main__":
    main()
