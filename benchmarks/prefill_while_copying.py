"""A long prompt to a model whose weights are gone: is it computed while they come?

    python benchmarks/prefill_while_copying.py --json results/gpu/prefill_while_copying_h200.json
    python benchmarks/prefill_while_copying.py --only layers --ahead 128MiB 512MiB --json FILE

Two servers of one shape take turns on a device. The steps of one wait for each layer
(`KVCACHED_WEIGHTS_WAIT=layers`), those of the other for all weights. A round measures, of each: the
prompt while all is there (the prefill), a prompt of few tokens with and without weights (the
difference is the copy, with all around it), the prompt right behind that (what a sleep gave up
beside weights is allocated again), and the prompt without weights (together). The bar is about the
quotient of the last and the longer of prefill and copy. Beside it a round copies as many
bytes from page-locked memory. `--ahead` says how many bytes of weights vLLM's driver is told of
ahead of what it has copied; with several, the server whose layers wait has a round with each.
`--engine sglang` needs prompts without captured graphs:
`--server-options=--disable-prefill-cuda-graph`. `--tiny` rehearses the logic on a CPU, whose times
say nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from parts.intervals import median_and_interval
from parts.link import copy_seconds
from parts.record import Record
from parts.vllm_servers import READY_SECONDS
from parts.yielding import FIRST, SECOND, Run, make_parser, recorded_run

from kvcached_core.units import parse_bytes
from kvcached_demo.harness.engines import ENGINES, SGLANG, VLLM, Engine

NUM_SHORT_TOKENS, NUM_LONG_TOKENS, NUM_TINY_TOKENS = 16, 8000, 1500
NUM_ROUNDS = 20
BAR = 1.15
NOT_BY_LAYER = "steps wait for all weights"
WAITS = {FIRST: "layers", SECOND: "all"}
# A prompt has to fit into one step: the layers of the first step wait, later ones find all there.
ONE_STEP = {
    VLLM.name: ("--max-num-batched-tokens", "8192"),
    SGLANG.name: ("--chunked-prefill-size", "8192"),
}


class LongPrompts:
    """The rounds, and what they measured.

    Args:
        run: The servers.
        num_tokens: Those of the long prompt.
        names: Which of them there are.
    """

    def __init__(self, run: Run, num_tokens: int, names: Sequence[str]) -> None:
        self._run, self._names = run, names
        self._num_tokens = num_tokens
        self._weights_bytes = run.view(FIRST).weights_bytes
        self.seconds: dict[str, dict[str, list[float]]] = {name: {} for name in names}
        self.link_seconds: list[float] = []

    def warm_up(self) -> None:
        """Have kernels compiled, and a forward watched, before anything counts."""
        for name in self._names:
            for num_tokens in (NUM_SHORT_TOKENS, self._num_tokens) * 2:
                self._run.first_token_seconds(name, num_tokens)

    def round(self, *, is_reversed: bool) -> None:
        """Measure all once, of both servers in turn."""
        names = sorted(self._names, reverse=is_reversed)
        for name in names:
            run, seconds = self._run, self.seconds[name]
            prefill = run.first_token_seconds(name, self._num_tokens)
            awake = run.first_token_seconds(name, NUM_SHORT_TOKENS)
            run.sleep(name)
            short = run.first_token_seconds(name, NUM_SHORT_TOKENS)
            behind = run.first_token_seconds(name, self._num_tokens)
            run.sleep(name)
            together = run.first_token_seconds(name, self._num_tokens)
            measured = {
                "prefill": prefill,
                "copy": short - awake,
                "behind": behind,
                "together": together,
            }
            for what, value in measured.items():
                seconds.setdefault(what, []).append(value)
        if not self._run.tiny:
            self.link_seconds.append(copy_seconds(self._weights_bytes, num=1))

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
                for name in self._names
            },
        }


def measure(run: Run, record: Record, engine: Engine, options: argparse.Namespace) -> None:
    """Start the servers, measure round by round, and record all of it after each."""
    names = [name for name, wait in WAITS.items() if options.only in {None, wait}]
    for seed, name in enumerate(names, 1):
        one_step = () if run.tiny else ONE_STEP[engine.name]
        run.start(name, seed, *one_step, KVCACHED_WEIGHTS_WAIT=WAITS[name])
    record.add(ready_seconds=run.servers.wait_ready(seconds=READY_SECONDS))
    for name in names:
        run.ask(name)
    record.add(copied_seconds=run.wait_copied(*names))
    num_tokens = NUM_TINY_TOKENS if run.tiny else NUM_LONG_TOKENS
    parts = {ahead: LongPrompts(run, num_tokens, names) for ahead in options.ahead or [None]}
    next(iter(parts.values())).warm_up()
    record.add(refusals=[line for name in names for line in refusals(run, name)])
    for number in range(options.rounds):
        for ahead, prompts in parts.items():
            if ahead is not None:
                run.call(FIRST, "set_ahead_bytes", parse_bytes(ahead, what="ahead"))
            prompts.round(is_reversed=number % 2 == 1)
            found = prompts.report()
            record.add(**(found if ahead is None else {ahead: found}))


def refusals(run: Run, name: str) -> list[str]:
    """Return the lines in which a server says that its layers do not wait by themselves."""
    lines = run.servers[name].log.read_text(errors="replace").splitlines()
    return [line for line in lines if NOT_BY_LAYER in line]


def table(results: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = [f"failed {results.get('failed')}, wrong tokens {results.get('wrong')}"]
    lines += results.get("refusals", [])
    lines += rows(results)
    for ahead in results["ahead"]:
        lines += [f"{ahead} ahead", *rows(results.get(ahead, {}))]
    return "\n".join(lines)


def rows(found: dict[str, Any]) -> list[str]:
    """Return the figures of each kind of server as text."""
    lines = []
    for wait in WAITS.values():
        for what, seconds in found.get(wait, {}).get("seconds", {}).items():
            median, low, high = median_and_interval(seconds)
            lines.append(f"{wait:8} {what:10} {median:8.4f} s ({low:.4f} to {high:.4f})")
        if wait in found:
            median, low, high = found[wait]["quotient"]
            lines.append(f"{wait:8} {'quotient':10} {median:8.3f}   ({low:.3f} to {high:.3f})")
    return lines


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--only", choices=WAITS.values(), help="one server, and not both")
    parser.add_argument("--ahead", nargs="+", default=[], help="of vLLM: 128MiB, for example")
    options = parser.parse_args()
    with recorded_run(options, ahead=options.ahead) as (run, record):
        measure(run, record, ENGINES[options.engine], options)
    print(table(record.results))
    if record.results["failed"] or record.results["wrong"]:
        sys.exit("an answer failed, or was wrong")


if __name__ == "__main__":
    main()
