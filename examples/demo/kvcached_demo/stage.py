"""What every act of the demo needs: its two servers, and a live view of their memory."""

import asyncio
import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live

from kvcached_core.cli.picture import Picture

if TYPE_CHECKING:
    from kvcached_demo.harness.engines import Engine
    from kvcached_demo.harness.memory import Recorder
    from kvcached_demo.harness.servers import Servers

NAMES = ("llama-a", "llama-b")
MOST_RUNNING = 32  # of each server
LOOK_SECONDS = 0.12


@dataclass(frozen=True)
class Setup:
    """What runs where.

    Attributes:
        engines: The kind of each of the two.
        models: The model of each.
        workspace: Where their files go.
        pool_bytes: The pool.
        num_tokens: The longest request; None for what the kind says.
        environ: More variables of both.
    """

    engines: list["Engine"]
    models: list[Path]
    workspace: Path
    pool_bytes: int
    num_tokens: int | None = None
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The engines, in words."""
        first, second = (engine.title for engine in self.engines)
        return f"two {first} servers" if first == second else f"a {first} and a {second} server"


@contextlib.contextmanager
def running(console: Console, setup: Setup, label: str, *, is_elastic: bool) -> Iterator["Servers"]:
    """Start both servers, wait until they answer, and end them behind the block.

    Args:
        console: Where it is said.
        setup: What runs.
        label: What is special about them, in words.
        is_elastic: Whether they are ours.
    """
    from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN
    from kvcached_demo.harness.servers import Servers

    with Servers(setup.workspace, setup.pool_bytes) as servers:
        for name, model, engine in zip(NAMES, setup.models, setup.engines, strict=True):
            servers.start(
                engine,
                name,
                model,
                *engine.caching(is_on=False),
                *engine.running(MOST_RUNNING),
                *engine.size(
                    setup.pool_bytes, KV_BYTES_PER_TOKEN, is_elastic=is_elastic, is_host=True
                ),
                *(() if setup.num_tokens is None else engine.longest(setup.num_tokens)),
                is_elastic=is_elastic,
                environ={
                    **engine.host_environ,
                    "VLLM_LOGGING_LEVEL": "WARNING",
                    **setup.environ,
                },
            )
        start = time.monotonic()
        with console.status(f"Starting {setup.title}, {label} …") as status:

            def tick() -> None:
                waited = time.monotonic() - start
                status.update(f"Starting {setup.title}, {label} … {waited:.0f} s")

            servers.wait_ready(tick=tick)
        console.print(f"Two servers ready, {label}, after {time.monotonic() - start:.0f} s")
        yield servers
        servers.stop()


async def watch(tasks: Iterable["asyncio.Task[Any]"], recorder: "Recorder", live: Live) -> None:
    """Show who holds what until all tasks are done."""
    waiting = set(tasks)
    while waiting:
        view = recorder.latest()
        if view is not None:
            live.update(Picture([view]))
        _, waiting = await asyncio.wait(waiting, timeout=LOOK_SECONDS)
