"""The first token of a model whose weights are gone, through `kvcached serve` and asked directly.

    python benchmarks/gateway_activation.py --json FILE
    python benchmarks/gateway_activation.py --json FILE --engine sglang
    python benchmarks/gateway_activation.py --json FILE --shape llama-70b --ranks 4 --eager
    python benchmarks/gateway_activation.py --json FILE --shape tiny    # rehearse on a CPU

A gateway starts two models with weights of their own. A round asks one of them in a state in turn:
its server directly, through the gateway, and directly once more, the control. The states: `gone`,
when it has given its weights and KV memory; `awake`; and `beside`, when the other model has its
weights, and there is not room for both: it gives first. What counts is the ratio to the direct
request of the same round.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gateway_through import CONTROL, DIRECT, THROUGH, WAYS, in_turn, start, summarise
from parts.gateway_client import Answer, send
from parts.gateway_schedule import Due, prompt
from parts.gateway_serve import Gateway, headroom_bytes
from parts.giving import fall_asleep, little_room, rows
from parts.intervals import AT_MOST, against_bar, median_interval
from parts.record import Record, begin_record, command_line

from kvcached_core import control
from kvcached_core.units import GIB, MIB
from kvcached_demo.harness.engines import ENGINES, VLLM
from kvcached_gateway.lease import Address

TINY = "tiny"
SHAPES = (TINY, "llama-1b", "llama-3b", "llama-8b", "llama-70b")
GONE, AWAKE, BESIDE = STATES = ("gone", "awake", "beside")
BARS_SECONDS = {"llama-8b": 0.7, "llama-70b": 1.5}
TINY_KV_BYTES = 256 * MIB
TTFT = "ttft_seconds"
SHARE = 0.98  # of a device that is not made smaller, as engines leave it by themselves
Round = dict[str, dict[str, float]]


class Run:
    """Two models behind a gateway, and what became of the requests to them.

    Args:
        gateway: It serves, and both are up.
        record: Where results go.
        options: The command line.
    """

    def __init__(self, gateway: Gateway, record: Record, options: argparse.Namespace) -> None:
        self._gateway, self._record, self._options = gateway, record, options
        self._prompt = prompt(2, options.prompt)
        self._addresses = gateway.addresses()
        self._right: dict[str, tuple[list[int], str]] = {}
        self._num_wrong = 0
        self._begin = time.monotonic()
        for name in gateway.names:
            answer = self._ask(name, self._addresses[name])
            self._right[name] = (answer.token_ids, answer.text)
        if len({str(right) for right in self._right.values()}) < len(gateway.names):
            raise RuntimeError(f"the models answer alike: {self._right}")

    def rounds(self, state: str, headroom: int) -> None:
        """Ask in a state, round by round; record what is known so far after each."""
        if state != BESIDE:
            self._rounds(state)
            return
        first, second = self._gateway.names
        fall_asleep(first, self._gateway.directory)
        self._ask(second, self._addresses[second])
        with little_room(first, self._gateway.directory, headroom):
            self._rounds(state)

    def _rounds(self, state: str) -> None:
        found: list[Round] = []
        while len(found) < self._options.rounds and self._is_time():
            number = len(found)
            name = self._gateway.names[number % 2]
            other = self._gateway.names[1 - number % 2]
            ways = {way: self._measure(state, way, name, other) for way in in_turn(number)}
            found.append({way: ways[way] for way in WAYS})
            known = self._record.results.get("states", {})
            known[state] = {"rounds": found} | summarise(found, (TTFT,))
            self._record.add(states=known, wrong=self._num_wrong)

    def _is_time(self) -> bool:
        return time.monotonic() - self._begin < self._options.seconds

    def _measure(self, state: str, way: str, name: str, other: str) -> dict[str, float]:
        """Bring a model into a state and ask it; return the time, and what it had before."""
        directory = self._gateway.directory
        if state == GONE:
            fall_asleep(name, directory)
            control.trim([name], directory=directory)
        else:
            prepared = other if state == BESIDE else name
            self._ask(prepared, self._addresses[prepared])
        before = rows(name, directory)
        weights_bytes = sum(row.weights_bytes for row in before)
        address = Address(self._gateway.url) if way == THROUGH else self._addresses[name]
        answer = self._ask(name, address)
        return {
            TTFT: answer.ttft_seconds or float("nan"),
            "weights_share": weights_bytes / sum(row.weights_needed_bytes for row in before),
            "kv_bytes": float(sum(row.resident_bytes for row in before) - weights_bytes),
            "activations": float(
                sum(row.activations.num for row in rows(name, directory))
                - sum(row.activations.num for row in before)
            ),
        }

    def _ask(self, name: str, address: Address) -> Answer:
        due = Due(0.0, name, self._prompt, self._options.tokens)
        (answer,) = asyncio.run(send(address, [due]))
        if answer.error:
            raise RuntimeError(f"a request to {name} failed: {answer.error}")
        right = self._right.get(name)
        self._num_wrong += right is not None and right != (answer.token_ids, answer.text)
        return answer


def table(results: Mapping[str, Any]) -> str:
    """Return the figures as text, of a run that was cut off, too."""
    bar = BARS_SECONDS.get(results["shape"])
    heads = ("state", "rounds", "there", *WAYS[:2], "through/direct", "control/direct", "bar")
    lines = [heads] + [
        line(state, results["states"][state], bar)
        for state in STATES
        if state in results.get("states", {})
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join(word.ljust(width) for word, width in zip(each, widths, strict=True)).rstrip()
        for each in lines
    ]
    return "\n".join([*texts, f"wrong answers: {results.get('wrong', 'unknown')}"])


def line(state: str, found: Mapping[str, Any], bar: float | None) -> tuple[str, ...]:
    """Return a state's row: medians in seconds, ratios with intervals, and the bar's verdict."""
    rounds: Sequence[Round] = found["rounds"]
    seconds = {way: [each[way][TTFT] for each in rounds] for way in (DIRECT, THROUGH)}
    ratios = []
    for way in (THROUGH, CONTROL):
        middle, low, high = found["medians_and_intervals"][way][TTFT]
        ratios.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
    share = statistics.fmean(each[way]["weights_share"] for each in rounds for way in WAYS)
    said = ""
    if bar is not None and state != AWAKE:
        said = f"{bar} s: {against_bar(median_interval(seconds[THROUGH]), AT_MOST, bar)}"
    medians = [f"{statistics.median(seconds[way]):.4f}" for way in (DIRECT, THROUGH)]
    return (state, str(len(rounds)), f"{share:.0%}", *medians, *ratios, said)


def make_parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b", help="tiny is for a CPU")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs, with a rank of each on each")
    parser.add_argument("--engine", choices=sorted(ENGINES), default=VLLM.name)
    parser.add_argument("--eager", action="store_true", help="a GPU's servers start sooner")
    parser.add_argument("--device-gib", type=float, help="as if each GPU were so small")
    parser.add_argument("--states", default=",".join(STATES), help="which, and in which order")
    parser.add_argument("--rounds", type=int, default=30, help="of each state")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no round begins later")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--start-seconds", type=float, default=900.0, help="for both starts")
    return parser


def main() -> None:
    """Measure, write JSON, print a table."""
    parser = make_parser()
    options = parser.parse_args()
    states, is_tiny = options.states.split(","), options.shape == TINY
    if not set(states) <= set(STATES):
        parser.error(f"--states takes some of {','.join(STATES)}, not {options.states}")
    if is_tiny and options.ranks > 1:
        parser.error("--ranks takes GPUs: engines on a CPU have one device")
    options.tiny = is_tiny
    record, engine = begin_record(options), ENGINES[options.engine]
    machine = record.results["machine"]
    headroom = 0
    if not is_tiny:
        gib = options.device_gib or SHARE * int(machine["gpu_bytes"]) / GIB
        headroom = headroom_bytes(machine, gib)
    record.add(
        engine=f"{engine.title} {engine.release()}",
        headroom_bytes=headroom,
        **{name: getattr(options, name) for name in ("shape", "ranks", "eager", "prompt")},
    )
    gateway = Gateway(
        2,
        cards=options.ranks,
        tiny=is_tiny,
        headroom_bytes=headroom,
        tiny_kv_bytes=TINY_KV_BYTES,
        max_starting=2,
        is_eager=options.eager,
        engine=engine,
        shape="llama-8b" if is_tiny else options.shape,
        ranks=options.ranks,
    )
    try:
        with gateway.recorded(options.json):
            begin = time.monotonic()
            start(gateway, options.prompt, options.start_seconds)
            record.add(start_seconds=time.monotonic() - begin)
            run = Run(gateway, record, options)
            for state in states:
                run.rounds(state, headroom)
    finally:
        print(table(record.results))


if __name__ == "__main__":
    main()
