"""The demo itself: models, three bursts, the same without kvcached, weights in turn, a verdict."""

import asyncio
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from kvcached_core.errors import KVCachedError
from kvcached_core.units import format_bytes
from kvcached_demo.stage import NAMES, Setup, running, watch

if TYPE_CHECKING:
    from kvcached_demo.harness.engines import Engine
    from kvcached_demo.harness.load import Burst, Completion
    from kvcached_demo.harness.memory import Recorder, Recording
    from kvcached_demo.harness.server import EngineServer

BURST_SHARE = 0.72
NUM_OUTPUT_TOKENS = 96
NUM_REQUESTS = 12
IDLE_SECONDS = 1.0
EXTRA_MODULES = ("httpx", "matplotlib", "numpy", "safetensors", "tokenizers")


class DemoError(KVCachedError, RuntimeError):
    """The demo cannot run here."""


def run_demo(output: Path, pool_bytes: int, engines: str = "vllm,vllm", *, workspace: Path) -> int:
    """Run the demo, write `memory.png` and `report.html` to `output`, return the exit code.

    Args:
        output: The folder.
        pool_bytes: The pool that both engines share.
        engines: The kinds of the two, with a comma between them.
        workspace: A folder for the models, the ledger and the logs.

    Raises:
        DemoError: If an engine or a package is missing, or the pool is too small.
    """
    _check_prerequisites(pool_bytes)
    chosen = _engines(engines)
    from kvcached_demo.harness.model import make_model
    from kvcached_demo.report import draw, write_page
    from kvcached_demo.turns import run_turns, turn_bursts
    from kvcached_demo.verdict import judge, judge_turns, table

    console = Console()
    start = time.monotonic()
    console.print("Making two tiny Llama models and their tokenizer …")
    models = [make_model(workspace / name, seed=seed) for seed, name in enumerate(NAMES, 1)]
    bursts, alone = _plan(pool_bytes), turn_bursts()
    setup = Setup(chosen, models, workspace, pool_bytes)
    recording, answers = _run_elastic(console, setup, bursts)
    vanilla, vanilla_alone = _run_vanilla(console, setup, bursts, alone)
    turns = run_turns(console, setup, alone)
    rows = judge(recording, answers, vanilla, pool_bytes) + judge_turns(turns, vanilla_alone)
    draw(recording, list(NAMES), pool_bytes, setup.title, output / "memory.png")
    write_page(rows, output / "memory.png", pool_bytes, output / "report.html")
    console.print(table(rows))
    console.print(
        f"{output / 'report.html'} and {output / 'memory.png'} written; "
        f"{time.monotonic() - start:.0f} s in all"
    )
    return 0 if all(is_met for *_, is_met in rows) else 1


def _check_prerequisites(pool_bytes: int) -> None:
    missing = [name for name in EXTRA_MODULES if find_spec(name) is None]
    if missing:
        raise DemoError(
            f"the demo needs {', '.join(missing)}; pip install 'kvcached-elastic[demo]'"
        )
    from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN

    needed = 2048 * KV_BYTES_PER_TOKEN * 4
    if pool_bytes < needed:
        raise DemoError(
            f"--pool={format_bytes(pool_bytes)} is too small for the demo's bursts; "
            f"needed {format_bytes(needed)} or more"
        )


def _engines(words: str) -> list["Engine"]:
    from kvcached_demo.harness.engines import ENGINES

    names = words.split(",")
    if len(names) != len(NAMES) or not set(names) <= set(ENGINES):
        raise DemoError(
            f"--engines={words!r} is not allowed; name two of {', '.join(sorted(ENGINES))}, with "
            "a comma between them"
        )
    for name in set(names):
        engine = ENGINES[name]
        if not engine.is_installed():
            raise DemoError(
                f"no {engine.title} is installed for {engine.python}; run `make demo` in a clone, "
                "or install it"
            )
    return [ENGINES[name] for name in names]


def _plan(pool_bytes: int) -> dict[str, "Burst"]:
    from kvcached_demo.harness.load import make_burst
    from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN

    pool_tokens = pool_bytes // KV_BYTES_PER_TOKEN
    num_prompt_tokens = int(pool_tokens * BURST_SHARE / NUM_REQUESTS) - NUM_OUTPUT_TOKENS
    return {
        name: make_burst(
            num_requests=NUM_REQUESTS,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=NUM_OUTPUT_TOKENS,
            seed=seed,
        )
        for seed, name in enumerate(NAMES)
    }


def _run_elastic(
    console: Console, setup: Setup, bursts: dict[str, "Burst"]
) -> tuple["Recording", dict[str, dict[str, "list[Completion]"]]]:
    from kvcached_demo.harness.memory import Recorder

    first, second = NAMES
    phases = [(f"burst on {first}", [first]), (f"burst on {second}", [second]), ("both", [*NAMES])]
    with running(console, setup, "elastic", is_elastic=True) as servers:
        with Recorder(servers.open_ledger) as recorder:
            answers = {}
            with Live(console=console, refresh_per_second=8) as live:
                for phase, names in phases:
                    recorder.mark(phase)
                    answers[phase] = asyncio.run(
                        _burst_and_watch(
                            [servers[name] for name in names], bursts, recorder, live, phase
                        )
                    )
                recorder.mark("idle")
                time.sleep(IDLE_SECONDS)
        return recorder.recording, answers


async def _burst_and_watch(
    servers: list["EngineServer"],
    bursts: dict[str, "Burst"],
    recorder: "Recorder",
    live: Live,
    phase: str,
) -> dict[str, "list[Completion]"]:
    tasks = {
        server.name: asyncio.create_task(server.send(bursts[server.name])) for server in servers
    }
    await watch(tasks.values(), recorder, live)
    live.console.print(Text(f"{phase}: all answers are in", "dim"))
    await asyncio.sleep(IDLE_SECONDS)
    return {name: task.result() for name, task in tasks.items()}


def _run_vanilla(
    console: Console, setup: Setup, *asked: Mapping[str, "Burst"]
) -> list[dict[str, "list[Completion]"]]:
    with (
        running(console, setup, "vanilla, a whole pool each", is_elastic=False) as servers,
        console.status("The same requests without kvcached, to compare every token …"),
    ):
        return [
            {name: asyncio.run(servers[name].send(bursts[name])) for name in NAMES}
            for bursts in asked
        ]
