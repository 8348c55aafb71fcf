"""The last act: a pool too small for the weights of both models, which answer in turn."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from kvcached_core.ledger.activations import NO_ACTIVATIONS, Activations
from kvcached_core.ledger.view import DeviceView, InstanceView
from kvcached_core.units import MIB
from kvcached_demo.harness.load import Burst, Completion, make_burst
from kvcached_demo.harness.memory import Recorder
from kvcached_demo.stage import NAMES, Setup, running, watch

if TYPE_CHECKING:
    from kvcached_demo.harness.servers import Servers

NUM_TURNS = 8  # of both together
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 96, 16
LONGEST_TOKENS = 128
# One model's weights take 12 MiB; beside them lie its longest request and the other's first page.
POOL_BYTES = 22 * MIB
PAGE_BYTES = 2 * MIB
PAUSE_SECONDS = 0.4  # so that people see who has weights
COPY_SECONDS = 30.0
ENVIRON = {
    "KVCACHED_WEIGHTS": "yield",
    "KVCACHED_WEIGHTS_KEPT_SECONDS": "0",
    "KVCACHED_PAGE_BYTES": str(PAGE_BYTES),
}


@dataclass(frozen=True)
class Turn:
    """One model is asked, and asked once more while its weights are there.

    Attributes:
        name: The model.
        was_yielded: Whether weights were missing when the first request came.
        given_bytes: What the other one gave of its weights for it.
        first: The answer to the first request.
        second: The answer to the second one.
    """

    name: str
    was_yielded: bool
    given_bytes: int
    first: Completion
    second: Completion


@dataclass(frozen=True)
class Turns:
    """What became of weights and requests.

    Attributes:
        turns: All, in their order.
        activations: Of each model.
        needed_bytes: The weights of both.
        pool_bytes: The pool.
    """

    turns: list[Turn]
    activations: dict[str, Activations]
    needed_bytes: int
    pool_bytes: int = POOL_BYTES


def turn_bursts() -> dict[str, Burst]:
    """Return what each model is asked in each of its turns: one request."""
    return {
        name: make_burst(
            num_requests=1,
            num_prompt_tokens=NUM_PROMPT_TOKENS,
            num_output_tokens=NUM_OUTPUT_TOKENS,
            seed=seed,
        )
        for seed, name in enumerate(NAMES, len(NAMES))
    }


def run_turns(console: Console, setup: Setup, bursts: Mapping[str, Burst]) -> Turns:
    """Start both on a small pool, with weights that yield, and ask one after the other."""
    small = replace(
        setup,
        workspace=setup.workspace / "turns",
        pool_bytes=POOL_BYTES,
        num_tokens=LONGEST_TOKENS,
        environ=ENVIRON,
    )
    small.workspace.mkdir()
    with (
        running(console, small, "on a pool too small for their weights", is_elastic=True) as found,
        Recorder(found.open_ledger) as recorder,
        Live(console=console, refresh_per_second=8) as live,
    ):
        _await_copies(found)
        turns = asyncio.run(_take_turns(found, bursts, recorder, live))
        live.console.print(Text("in turn: all answers are in", "dim"))
        rows = _rows(found.device())
    return Turns(
        turns,
        {name: rows[name].activations if name in rows else NO_ACTIVATIONS for name in NAMES},
        sum(row.weights_needed_bytes for row in rows.values()),
    )


def _await_copies(servers: "Servers") -> None:
    """Wait until all weights that are there may be given; who waits longer waits in a request."""
    deadline = time.monotonic() + COPY_SECONDS
    while time.monotonic() < deadline and any(
        not row.weights_needed_bytes or row.weights_offered_bytes < row.weights_bytes
        for row in servers.device().instances
    ):
        time.sleep(0.05)


async def _take_turns(
    servers: "Servers", bursts: Mapping[str, Burst], recorder: Recorder, live: Live
) -> list[Turn]:
    turns = []
    for number in range(NUM_TURNS):
        task = asyncio.create_task(_turn(servers, NAMES[number % len(NAMES)], bursts))
        await watch([task], recorder, live)
        turns.append(task.result())
        await watch([asyncio.create_task(asyncio.sleep(PAUSE_SECONDS))], recorder, live)
    return turns


async def _turn(servers: "Servers", name: str, bursts: Mapping[str, Burst]) -> Turn:
    before = _rows(servers.device())
    (first,) = await servers[name].send(bursts[name])
    (second,) = await servers[name].send(bursts[name])
    after = _rows(servers.device())
    return Turn(
        name,
        before[name].weights_bytes < before[name].weights_needed_bytes,
        sum(
            max(before[other].weights_bytes - after[other].weights_bytes, 0)
            for other in NAMES
            if other != name
        ),
        first,
        second,
    )


def _rows(device: DeviceView) -> dict[str, InstanceView]:
    return {row.name: row for row in device.instances}
