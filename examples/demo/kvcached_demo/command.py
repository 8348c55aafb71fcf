"""The command `kvcached demo`; what it needs beside the core is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from kvcached_core.units import parse_bytes
from kvcached_demo.watched import run_watched


def demo(
    output: Annotated[Path, typer.Option(help="Where report and picture go.")] = Path("demo"),
    pool: Annotated[str, typer.Option(help="The pool that both engines share.")] = "512MiB",
    engines: Annotated[str, typer.Option(help="Two of vllm and sglang.")] = "vllm,vllm",
) -> None:
    """Run two real servers on one pool: memory follows the load, then weights take turns."""
    pool_bytes = parse_bytes(pool, what="--pool")

    def work(workspace: Path) -> int:
        from kvcached_demo.run import run_demo

        return run_demo(output, pool_bytes, engines, workspace=workspace)

    raise typer.Exit(run_watched(work, prefix="kvcached-demo-"))
