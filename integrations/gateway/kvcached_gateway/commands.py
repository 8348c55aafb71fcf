"""The gateway's commands: `kvcached serve`, `models`, `warm`, `stop`, `pin`, `reload` and so on.

`kvcached sleep` and `wake` are the core's own; they take a model's name, too (`naming`).
"""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from kvcached_core.cli.app import EXIT_INCOMPLETE
from kvcached_core.cli.options import AsJson, Directory
from kvcached_core.cli.output import EXIT_FAILED
from kvcached_core.errors import KVCachedError
from kvcached_core.units import MAX_SECONDS, default_directory
from kvcached_gateway.admin.client import Client, GatewayError
from kvcached_gateway.admin.views import ModelRow
from kvcached_gateway.settings.durations import duration
from kvcached_gateway.state import State

FOLLOW_SECONDS = 0.2
WARM_SECONDS = 900.0


def _names(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names that a shell completes."""
    directory = context.params.get("directory") or default_directory()
    with suppress(KVCachedError):
        rows = Client(Path(directory)).models()
        return [row.id for row in rows if row.id.startswith(incomplete)]
    return []


Name = Annotated[
    str, typer.Argument(help="The model, as the file names it.", autocompletion=_names)
]
File = Annotated[Path, typer.Argument(help="The file of models, such as models.yaml.")]
Timeout = Annotated[
    float, typer.Option(min=0.0, max=MAX_SECONDS, help="Seconds to wait until it is done.")
]


def serve(
    file: File,
    directory: Directory = default_directory(),
    check: Annotated[
        bool, typer.Option("--check", help="Look whether it could be served, and end.")
    ] = False,
    adopt: Annotated[
        bool, typer.Option(help="Keep engines that an earlier gateway left, or end them.")
    ] = True,
) -> None:
    """Serve many models behind one URL; Ctrl-C or SIGTERM ends it, SIGHUP reads the file again."""
    try:
        from kvcached_gateway.admin.doctor import examine
        from kvcached_gateway.settings.config_file import read_settings

        # What starts engines is loaded only for that: to look at a file needs none of it.
        run = None if check else import_module("kvcached_gateway.serve").run
    except ImportError as error:
        raise GatewayError(f"{error}; pip install 'kvcached-elastic[gateway]'") from error
    settings = read_settings(file)
    if run is not None:
        raise typer.Exit(run(settings, directory, adopt))

    is_good = True
    for is_right, text in examine(settings, directory):
        typer.echo(f"{'ok  ' if is_right else 'FAIL'}  {text}")
        is_good = is_good and is_right
    if not is_good:
        raise typer.Exit(EXIT_FAILED)


def models(
    directory: Directory = default_directory(),
    as_json: AsJson = False,
) -> None:
    """Show every model of the gateway: its state, where it is, who waits."""
    rows = Client(directory).models()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title, is_number in COLUMNS.items():
        table.add_column(
            title,
            justify="right" if is_number else "left",
            no_wrap=title != WIDEST,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*_cells(row))
    Console().print(table)


WIDEST = "why"  # it takes more lines where a terminal is narrow
COLUMNS = {
    "model": False,
    "state": False,
    "for": True,
    "devices": False,
    "requests": True,
    "waiting": True,
    "longest": True,
    "starts": True,
    "takes": True,
    WIDEST: False,
}


def _cells(row: ModelRow) -> Sequence[str]:
    why = row.failure.splitlines()[-1] if row.failure else row.reason
    return (
        f"{row.id} (pinned)" if row.is_pinned else row.id,
        row.state,
        duration(row.since_seconds),
        ", ".join(row.devices),
        str(row.num_leases),
        str(row.num_waiting),
        duration(row.oldest_wait_seconds) if row.num_waiting else "",
        str(row.num_starts),
        duration(row.start_seconds) if row.start_seconds else "",
        why,
    )


def warm(
    name: Name,
    directory: Directory = default_directory(),
    timeout: Timeout = WARM_SECONDS,
) -> None:
    """Start a model, or wake it, before a request does."""
    _steer(directory, name, "warm", timeout)


def stop(
    name: Name,
    directory: Directory = default_directory(),
    timeout: Timeout = 60.0,
) -> None:
    """End a model's engine when its requests are done; its next request starts it again."""
    _steer(directory, name, "stop", timeout)


def pin(name: Name, directory: Directory = default_directory()) -> None:
    """Keep a model: it is never stopped for another."""
    _steer(directory, name, "pin", 0.0)


def unpin(name: Name, directory: Directory = default_directory()) -> None:
    """Let a model be stopped for another again."""
    _steer(directory, name, "unpin", 0.0)


def reload(directory: Directory = default_directory()) -> None:
    """Read the file of models again: all of it, or nothing where it has a mistake."""
    typer.echo(Client(directory).reload())


def explain(name: Name, directory: Directory = default_directory()) -> None:
    """Say why a model is where it is, and what would go next."""
    typer.echo(Client(directory).explain(name))


def logs(
    name: Name,
    directory: Directory = default_directory(),
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many at first.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
) -> None:
    """Show what a model's engine writes."""
    rows = {row.id: row for row in Client(directory).models()}
    if name not in rows:
        raise GatewayError(f"there is no model {name!r}; there are {', '.join(rows) or 'none'}")
    if not rows[name].log:
        raise GatewayError(f"{name!r} has no log: it was not started yet, or runs elsewhere")
    with suppress(KeyboardInterrupt, BrokenPipeError):
        show_log(Path(rows[name].log), lines, is_followed=follow)


def show_log(path: Path, num_lines: int, *, is_followed: bool) -> None:
    """Write the last lines of a file, and what comes behind them until Ctrl-C."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise GatewayError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        found = file.read().splitlines(keepends=True)
        _write(b"".join(found[max(len(found) - num_lines, 0) :]))
        while is_followed:
            _write(file.read())
            time.sleep(FOLLOW_SECONDS)  # a person reads it; a file has nothing to wait on


def _write(content: bytes) -> None:
    if content:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()


def _steer(directory: Path, name: str, verb: str, seconds: float) -> None:
    text, row, is_settled = Client(directory).steer(name, verb, seconds)
    typer.echo(text)
    if seconds and not is_settled:
        typer.echo(f"{name} is still {row.state}", err=True)
        raise typer.Exit(EXIT_INCOMPLETE)
    if row.state == State.FAILED:
        raise GatewayError(f"{name} failed: {row.failure}")
