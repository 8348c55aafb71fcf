"""The command line: what there is, and how it ends.

Exit codes: 0 done, 1 failed with a message, 2 wrong usage, 3 `trim` could not free all it was asked
to within its time.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcached_core import __version__
from kvcached_core.config import PREFIX, default_directory
from kvcached_core.errors import KVCachedError
from kvcached_core.ledger import DeviceView, Ledger

EXIT_FAILED = 1
EXIT_INCOMPLETE = 3

app = typer.Typer(
    name="kvcached",
    help="See and steer the KV memory that engines share.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Directory = Annotated[
    Path,
    typer.Option(
        "--dir", envvar=PREFIX + "DIR", help="The folder of the ledgers.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")]


def read_devices(directory: Path) -> list[DeviceView]:
    """Return every device that has a ledger in `directory`; none is not an error."""
    views = []
    for path in sorted(directory.glob("*.ledger")):
        with Ledger(path) as ledger:
            views.append(ledger.view())
    return views


def to_json(devices: list[DeviceView]) -> str:
    """Return the devices as JSON."""
    return json.dumps(
        {"devices": [{**asdict(view), "free_bytes": view.free_bytes} for view in devices]}, indent=2
    )


def _print_version(value: bool) -> None:  # noqa: FBT001  typer calls it like this
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(name="list")
def list_instances(directory: Directory = default_directory(), as_json: AsJson = False) -> None:
    """List the instances: a line each."""
    devices = read_devices(directory)
    if as_json:
        typer.echo(to_json(devices))
        return
    for view in devices:
        for instance in view.instances:
            typer.echo(f"{view.device}\t{instance.name}\t{instance.engine}\tpid {instance.pid}")


@app.command()
def top(
    directory: Directory = default_directory(),
    as_json: AsJson = False,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two pictures.")] = 0.5,
) -> None:
    """Show who holds how much: live on a terminal, once elsewhere."""
    if as_json:
        typer.echo(to_json(read_devices(directory)))
        return
    from rich.console import Console

    from kvcached_core.cli.top import picture, watch

    console = Console()
    if once or not console.is_terminal:
        console.print(picture(read_devices(directory)))
    else:
        watch(console, lambda: read_devices(directory), interval)


@app.command()
def trim(
    names: Annotated[list[str] | None, typer.Argument(help="Instances; all if none.")] = None,
    directory: Directory = default_directory(),
    keep: Annotated[
        str, typer.Option(help="What each may keep beside its requests' memory.")
    ] = "0",
    timeout: Annotated[float, typer.Option(min=0.0, help="Seconds to wait.")] = 5.0,
) -> None:
    """Make instances give back idle pages and cached blocks; requests keep theirs."""
    from kvcached_core.cli.trim import trim_instances
    from kvcached_core.units import format_bytes, parse_bytes

    results = trim_instances(
        directory, names or [], keep_bytes=parse_bytes(keep, what="--keep"), timeout_seconds=timeout
    )
    for result in results:
        typer.echo(
            f"{result.name}: {format_bytes(result.before_bytes)} -> "
            f"{format_bytes(result.after_bytes)}{'' if result.is_done else ' (still trimming)'}"
        )
    if not all(result.is_done for result in results):
        raise typer.Exit(EXIT_INCOMPLETE)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where report and picture go.")] = Path("demo"),
    pool: Annotated[str, typer.Option(help="The pool that both engines share.")] = "512MiB",
) -> None:
    """Run two real vLLM servers on one pool and watch the memory follow the load."""
    from kvcached_core.cli.demo.run import run_demo
    from kvcached_core.units import parse_bytes

    raise typer.Exit(run_demo(output, parse_bytes(pool, what="--pool")))


def main() -> Any:
    """Run the command; an error of ours is a message, not a traceback."""
    try:
        return app()
    except KVCachedError as error:
        typer.echo(f"kvcached: {error}", err=True)
        sys.exit(EXIT_FAILED)
