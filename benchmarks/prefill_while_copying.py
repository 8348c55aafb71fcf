"""A long prompt to a model whose weights are gone: is it computed while they come?

    python benchmarks/prefill_while_copying.py --json results/gpu/prefill_while_copying_h200.json

Two servers of one shape take turns on a device. The steps of one wait for each layer
(`KVCACHED_WEIGHTS_WAIT=layers`), those of the other for all weights. A round measures, of each: the
prompt while all is there (the prefill), a prompt of few tokens with and without weights (the
difference is the copy, with all around it), and the prompt without weights (together). The bar is
about the quotient of the last and the longer of the first two. Beside it a round copies as many
bytes from page-locked memory. `--engine sglang` needs prompts without captured graphs:
`--server-options=--disable-prefill-cuda-graph`. `--tiny` rehearses the logic on a CPU, whose times
say nothing.
"""

import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from intervals import median_and_interval
from machine import describe_gpu, describe_machine
from vllm_servers import READY_SECONDS, Record
from yielding import FIRST, SECOND, Run, make_parser

from kvcached_core.units import GIB
from kvcached_demo.harness.engines import ENGINES, SGLANG, VLLM, Engine

NUM_SHORT_TOKENS, NUM_LONG_TOKENS, NUM_TINY_TOKENS = 16, 8000, 1500
NUM_ROUNDS = 20
BAR = 1.15
WAITS = {FIRST: "layers", SECOND: "all"}
# A prompt has to fit into one step: the layers of the first step wait, later ones find all there.
ONE_STEP = {
    VLLM.name: ("--max-num-batched-tokens", "8192"),
    SGLANG.name: ("--chunked-prefill-size", "8192"),
}
COPY_BYTES = GIB  # at a time: beside two servers there is not room for all of it


class LongPrompts:
    """The rounds, and what they measured.

    Args:
        run: The servers.
        num_tokens: Those of the long prompt.
    """

    def __init__(self, run: Run, num_tokens: int) -> None:
        self._run = run
        self._num_tokens = num_tokens
        self._weights_bytes = run.view(FIRST).weights_bytes
        self.seconds: dict[str, dict[str, list[float]]] = {name: {} for name in WAITS}
        self.link_seconds: list[float] = []

    def warm_up(self) -> None:
        """Have kernels compiled, and a forward watched, before anything counts."""
        for name in WAITS:
            for num_tokens in (NUM_SHORT_TOKENS, self._num_tokens) * 2:
                self._run.first_token_seconds(name, num_tokens)

    def round(self, *, is_reversed: bool) -> None:
        """Measure all once, of both servers in turn."""
        names = sorted(WAITS, reverse=is_reversed)
        for name in names:
            run, seconds = self._run, self.seconds[name]
            prefill = run.first_token_seconds(name, self._num_tokens)
            awake = run.first_token_seconds(name, NUM_SHORT_TOKENS)
            run.sleep(name)
            short = run.first_token_seconds(name, NUM_SHORT_TOKENS)
            run.sleep(name)
            together = run.first_token_seconds(name, self._num_tokens)
            measured = {"prefill": prefill, "copy": short - awake, "together": together}
            for what, value in measured.items():
                seconds.setdefault(what, []).append(value)
        if not self._run.tiny:
            self.link_seconds.append(copy_seconds(self._weights_bytes))

    def report(self) -> dict[str, Any]:
        """Return all that was measured, and the quotients with their intervals."""
        quotients = {
            name: [
                together / max(prefill, copy)
                for together, prefill, copy in zip(
                    seconds["together"], seconds["prefill"], seconds["copy"], strict=True
                )
            ]
            for name, seconds in self.seconds.items()
        }
        return {
            "num_tokens": self._num_tokens,
            "weights_bytes": self._weights_bytes,
            "link_seconds": self.link_seconds,
            "bar": BAR,
            **{
                WAITS[name]: {
                    "seconds": self.seconds[name],
                    "quotients": quotients[name],
                    "quotient": median_and_interval(quotients[name]),
                }
                for name in WAITS
            },
        }


def copy_seconds(num_bytes: int) -> float:
    """Return how long it takes to copy so many bytes from page-locked memory to the device."""
    import torch

    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(-(-num_bytes // COPY_BYTES)):
        device.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    del host, device
    torch.cuda.empty_cache()
    return seconds * num_bytes / (-(-num_bytes // COPY_BYTES) * COPY_BYTES)


def measure(run: Run, record: Record, engine: Engine, num_rounds: int) -> None:
    """Start both servers, measure round by round, and record all of it after each."""
    for seed, (name, wait) in enumerate(WAITS.items(), 1):
        one_step = () if run.tiny else ONE_STEP[engine.name]
        run.start(name, seed, *one_step, KVCACHED_WEIGHTS_WAIT=wait)
    run.servers.wait_ready(seconds=READY_SECONDS)
    for name in WAITS:
        run.ask(name)
    record.add(copied_seconds=run.wait_copied(*WAITS))
    prompts = LongPrompts(run, NUM_TINY_TOKENS if run.tiny else NUM_LONG_TOKENS)
    prompts.warm_up()
    for number in range(num_rounds):
        prompts.round(is_reversed=number % 2 == 1)
        record.add(**prompts.report())


def table(results: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = [f"failed {results.get('failed')}, wrong tokens {results.get('wrong')}"]
    for wait in WAITS.values():
        found = results.get(wait, {})
        for what, seconds in found.get("seconds", {}).items():
            median, low, high = median_and_interval(seconds)
            lines.append(f"{wait:8} {what:10} {median:8.4f} s ({low:.4f} to {high:.4f})")
        if "quotient" in found:
            median, low, high = found["quotient"]
            lines.append(f"{wait:8} {'quotient':10} {median:8.3f}   ({low:.3f} to {high:.3f})")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--server-options", default="", help="more arguments of both servers")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    engine, more = ENGINES[options.engine], shlex.split(options.server_options)
    with tempfile.TemporaryDirectory(prefix="kv-", ignore_cleanup_errors=True) as folder:
        record = Record(options.json)
        record.add(machine=describe_machine() if options.tiny else describe_gpu())
        record.add(engine=f"{engine.title} {engine.release()}", server_options=more)
        run = Run(
            Path(folder),
            tiny=options.tiny,
            runner=options.runner,
            engine=engine,
            server_options=more,
        )
        try:
            measure(run, record, engine, options.rounds)
        finally:
            run.close(record)
    print(table(record.results))
    if record.results["failed"] or record.results["wrong"]:
        sys.exit("an answer failed, or was wrong")


if __name__ == "__main__":
    main()
