"""Many models behind the URL of `kvcached serve`, on one GPU or two.

    python benchmarks/gateway_gpu.py --json benchmarks/results/gpu/gateway_gpu_h200.json
    python benchmarks/gateway_gpu.py --json FILE --cards 2 --models 3 --parts move

Servers of one shape with weights of their own, more than the device has room for at a time, start
by their first request. `bursts` asks them in bursts, of which two at most overlap. `classes` sends
one schedule twice: without classes, and with a strict one and a loose one, which a reload brings.
`move` loads two models of one GPU until one moves to the other. All begin when every model is up.
`--end-seconds` leaves what was reached in the file. `--tiny` rehearses on a CPU.
"""

import argparse
import asyncio
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from parts.gateway_client import Answer, send, send_first
from parts.gateway_move import move
from parts.gateway_schedule import (
    LOOSE_SHARE,
    STRICT_SHARE,
    Due,
    bursts,
    num_overlapping,
    prompt,
    rivals,
    start_seconds,
)
from parts.gateway_serve import CHUNK_TOKENS, Gateway, headroom_bytes
from parts.gateway_table import table
from parts.record import Record, begin_record, command_line, end_by_signals

from kvcached_core.units import GIB

PARTS = ("bursts", "classes", "move")
NUM_PROMPTS, PROMPT_TOKENS, NUM_TOKENS = 4, 256, 16
STRICT_TOKENS, LOOSE_TOKENS = 1000, 1900
NUM_GAUGES = 12  # requests that tell what the device reads
GOAL_PROMPTS = 15  # the strict goal, as times of reading one of its prompts
LOOSE_SECONDS = 30.0
TINY_KV_BYTES = 2 * GIB  # for the prompts of `classes`
COPY_SECONDS = 60.0
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

    def _send(self, schedule: Sequence[Due], answers: list[Answer] | None = None) -> list[Answer]:
        """Send requests, and count those that failed also when it is cut off."""
        found = [] if answers is None else answers
        try:
            asyncio.run(send(self._gateway.url, schedule, found))
        finally:
            failed = [answer.error for answer in found if answer.error]
            self.num_failed += len(failed)
            errors = (self._record.results.get("errors", []) + failed)[:20]
            self._record.add(failed=self.num_failed, **({"errors": errors} if errors else {}))
        return found

    def start(self, seconds: float) -> None:
        """Start every model by its first request, all at once; keep those that are up in time."""
        begin = time.monotonic()

        def note(answers: Sequence[Answer]) -> None:
            self.names = [answer.due.model for answer in answers if not answer.error]
            self._record.add(
                start={
                    "seconds": time.monotonic() - begin,
                    "first_tokens_seconds": {one.due.model: one.ttft_seconds for one in answers},
                    "start_seconds": {
                        row.id: row.start_seconds for row in self._gateway.client.models()
                    },
                    "errors": [answer.error for answer in answers if answer.error],
                }
            )

        first = [Due(0.0, name, PROMPTS[0], NUM_TOKENS) for name in self._gateway.names]
        asyncio.run(send_first(self._gateway.url, first, seconds, note))
        if len(self.names) < len(self._gateway.names):
            self._gateway.names = self.names
            self._gateway.write()
            print(self._gateway.client.reload())
        self._know()
        self._record.add(copied_seconds=self._await_copies())

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
            num_tokens=NUM_TOKENS,
        )
        begin = time.monotonic()
        answers: list[Answer] = []
        found: dict[str, Any] = {"overlapping": num_overlapping(schedule)}
        try:
            self._send(schedule, answers)
        finally:
            over = [one for one in answers if one.is_over]
            times = sorted(one.ttft_seconds for one in over if one.ttft_seconds is not None)
            found |= {
                "requests": len(over),
                "cut_off": len(schedule) - len(over),
                "seconds": time.monotonic() - begin,
                "failed": sum(bool(answer.error) for answer in over),
                "woken": dict(Counter(answer.woken or "no" for answer in over)),
                "late_seconds": max((answer.late_seconds for answer in over), default=0.0),
                "ttft_seconds": times,
                "same_tokens": sum(map(self._is_right, over)),
                "same_first_token": sum(self._is_right(answer, 1) for answer in over),
                "of_another_model": sum(map(self._is_of_another, over)),
            }
            self._record.add(bursts=found)
        alone = self._send([Due(0.0, name, PROMPTS[0], NUM_TOKENS) for name in self.names])
        found |= {
            "wrong_alone": sum(not self._is_right(answer) for answer in alone),
            "activations": sum(row.activations.num for row in self._gateway.instances().values()),
            "starts": {row.id: row.num_starts for row in self._gateway.client.models()},
        }
        self._record.add(bursts=found)

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
        found: dict[str, Any] = {
            "tokens_per_second": speed,
            "goals_seconds": goals,
            "strict_share": STRICT_SHARE,
            "loose_share": LOOSE_SHARE,
        }
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
        self._record.add(move=move(self._gateway.client, self._send, PROMPTS, 4 * NUM_TOKENS))

    def close(self) -> None:
        """Write down what the gateway decided."""
        decisions = self._gateway.client.decisions()
        kept = [asdict(one) for one in decisions if one.verb != "wait"][-60:]
        self._record.add(decisions=kept, verbs=dict(Counter(one.verb for one in decisions)))


def main() -> None:
    """Run the command line."""
    arguments = command_line(__doc__, can_rehearse=True)
    arguments.add_argument("--parts", default="bursts,classes", help=f"some of {','.join(PARTS)}")
    arguments.add_argument("--models", type=int, default=6)
    arguments.add_argument("--cards", type=int, default=1)
    arguments.add_argument("--device-gib", type=float, default=80.0)
    arguments.add_argument("--requests", type=int, default=1000, help="of the bursts")
    arguments.add_argument("--seconds", type=float, default=20.0, help="of the load with classes")
    arguments.add_argument("--start-seconds", type=float, default=900.0, help="for all starts")
    arguments.add_argument("--starting", type=int, help="how many start at a time")
    arguments.add_argument("--end-seconds", type=int, help="when it ends, whatever was reached")
    options = arguments.parse_args()
    end_by_signals(signal.SIGALRM)
    signal.alarm(options.end_seconds or 0)
    record = begin_record(options)
    record.add(chunk_tokens=CHUNK_TOKENS)
    machine = record.results["machine"]
    gateway = Gateway(
        options.models,
        cards=options.cards,
        tiny=options.tiny,
        headroom_bytes=0 if options.tiny else headroom_bytes(machine, options.device_gib),
        max_starting=options.starting,
        tiny_kv_bytes=TINY_KV_BYTES if "classes" in options.parts else 0,
    )
    try:
        with gateway.recorded(options.json):
            run = Run(gateway, record, options)
            try:
                run.start(
                    start_seconds(options.requests, options.start_seconds, options.end_seconds)
                )
                for part in options.parts.split(","):
                    getattr(run, part)()
            finally:
                run.close()
    finally:
        print(table(record.results))


if __name__ == "__main__":
    main()
