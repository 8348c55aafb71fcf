"""The command line: what there is, and how it ends.

Exit codes: 0 done; 1 failed or refused, with a message; 2 wrong usage; 3 still in progress when the
time was up; `doctor`: 1 if it found a problem.
"""

import json
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcached_core import __version__, control
from kvcached_core.cli import running
from kvcached_core.cli.added import Added, added, instance_named
from kvcached_core.cli.commands import Commands
from kvcached_core.cli.options import AsJson, Directory
from kvcached_core.cli.output import EXIT_FAILED, printing
from kvcached_core.control import Outcome, Result
from kvcached_core.errors import KVCachedError
from kvcached_core.ledger.survey import Survey, survey
from kvcached_core.units import MAX_SECONDS, default_directory

EXIT_INCOMPLETE = 3

app = typer.Typer(
    name="kvcached",
    cls=Commands,
    help="See and steer the KV memory that engines share.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

NOBODY = "no instance runs"


def _names(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names that a shell completes: those of the instances that run."""
    directory = context.params.get("directory") or default_directory()
    with suppress(KVCachedError, OSError):
        devices = survey(Path(directory)).devices
        found = {instance.name for view in devices for instance in view.instances}
        found.update(each.name for each in added(Path(directory)))
        return sorted(name for name in found if name.startswith(incomplete))
    return []


Name = Annotated[
    str, typer.Argument(help="The instance, as `kvcached list` names it.", autocompletion=_names)
]
Timeout = Annotated[
    float, typer.Option(min=0.0, max=MAX_SECONDS, help="Seconds to wait until it holds.")
]
# A word that begins with a dash, such as a size of -1GiB, is an argument and no option.
DASHES = {"ignore_unknown_options": True}


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
    from kvcached_core.cli.listing import line, to_json
    from kvcached_core.cli.tiers import tiers

    found = survey(directory)
    seen = tiers(directory)
    if as_json:
        typer.echo(to_json(found, seen))
    elif not found.problems and not any(view.instances for view in found.devices):
        typer.echo(NOBODY, err=True)
    else:
        for view in found.devices:
            for instance in view.instances:
                typer.echo(line(view, instance, seen))
    _end_for(found.problems)


@app.command()
def top(
    directory: Directory = default_directory(),
    as_json: AsJson = False,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, max=MAX_SECONDS, help="Seconds between two pictures.")
    ] = 0.5,
) -> None:
    """Show who holds how much: live on a terminal, once elsewhere."""
    from kvcached_core.cli.listing import to_json
    from kvcached_core.cli.tiers import tiers, with_tiers

    if as_json:
        found = survey(directory)
        typer.echo(to_json(found, tiers(directory)))
        _end_for(found.problems)
        return
    from rich.console import Console

    from kvcached_core.cli.picture import Picture
    from kvcached_core.cli.top import watch

    def read() -> tuple[Survey, list[Added]]:
        found = survey(directory)
        names = {row.name for view in found.devices for row in view.instances}
        return found, with_tiers(added(directory), tiers(directory), names)

    console = Console()
    if not once and console.is_terminal:
        watch(console, read, interval)
        return
    found, said = read()
    if found.devices or not found.problems:
        console.print(Picture(found.devices, said=said))
    _end_for(found.problems)


@app.command(context_settings=DASHES)
def limit(
    name: Name,
    size: Annotated[str, typer.Argument(help="Such as 24GiB, 50% or none.")],
    directory: Directory = default_directory(),
    timeout: Timeout = control.PATIENCE_SECONDS,
) -> None:
    """Set the most an instance may hold; what it holds above that it gives back."""
    name = instance_named(name, directory)
    _end([control.set_limit(name, size, directory=directory, wait_seconds=timeout)])


@app.command(context_settings=DASHES)
def floor(
    name: Name,
    size: Annotated[str, typer.Argument(help="Such as 24GiB, 50% or none.")],
    directory: Directory = default_directory(),
    timeout: Timeout = control.PATIENCE_SECONDS,
    force: Annotated[
        bool, typer.Option("--force", help="Even if another one's longest request has to wait.")
    ] = False,
) -> None:
    """Set what an instance can always get back."""
    name = instance_named(name, directory)
    result = control.set_floor(
        name, size, directory=directory, wait_seconds=timeout, is_forced=force
    )
    _end([result])


@app.command(context_settings=DASHES)
def priority(
    name: Name,
    number: Annotated[int, typer.Argument(help="-1000 to 1000; the lowest gives first.")],
    directory: Directory = default_directory(),
) -> None:
    """Set how late an instance gives its cached blocks to others."""
    name = instance_named(name, directory)
    _end([control.set_priority(name, number, directory=directory)])


@app.command()
def sleep(name: Name, directory: Directory = default_directory(), timeout: Timeout = 5.0) -> None:
    """Make an idle instance give its weights back; its next request brings them back."""
    name = instance_named(name, directory)
    _end([control.sleep(name, directory=directory, wait_seconds=timeout)])


@app.command()
def wake(name: Name, directory: Directory = default_directory(), timeout: Timeout = 5.0) -> None:
    """Make an instance get its weights back before the first request."""
    name = instance_named(name, directory)
    _end([control.wake(name, directory=directory, wait_seconds=timeout)])


@app.command()
def trim(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Instances; all if none.", autocompletion=_names),
    ] = None,
    directory: Directory = default_directory(),
    keep: Annotated[
        str, typer.Option(help="What each may keep beside its requests' memory.")
    ] = "0",
    timeout: Timeout = 5.0,
) -> None:
    """Make instances give back idle pages and cached blocks; requests keep theirs."""
    from kvcached_core.units import parse_bytes

    keep_bytes = parse_bytes(keep, what="--keep")
    results = control.trim(
        names or [], directory=directory, keep_bytes=keep_bytes, wait_seconds=timeout
    )
    if not results:
        typer.echo(f"{NOBODY}: nothing to trim", err=True)
    _end(results)


@app.command()
def doctor(directory: Directory = default_directory(), as_json: AsJson = False) -> None:
    """Look for what keeps engines from sharing memory, and say what to do."""
    from kvcached_core.cli.doctor import examine

    findings = examine(directory)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            typer.echo(f"{'ok  ' if finding.is_good else 'FAIL'}  {finding.what}: {finding.text}")
    if not all(finding.is_good for finding in findings):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def metrics(
    directory: Directory = default_directory(),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Serve on this port.")] = 9410,
    host: Annotated[str, typer.Option(help="Serve on this address.")] = "127.0.0.1",
    once: Annotated[bool, typer.Option("--once", help="Print once, for a textfile.")] = False,
) -> None:
    """Serve Prometheus metrics until Ctrl-C, or print them once."""
    from kvcached_core.cli.metrics import exposition, serve

    if once:
        typer.echo(exposition(directory), nl=False)
    else:
        serve(directory, host, port)


app.command(name="run", context_settings=running.SETTINGS)(running.run_program)


def _end_for(problems: list[str]) -> None:
    for problem in problems:
        typer.echo(f"kvcached: {problem}", err=True)
    if problems:
        raise typer.Exit(EXIT_FAILED)


def _end(results: list[Result]) -> None:
    outcomes = {result.outcome for result in results}
    for result in results:
        typer.echo(control.describe(result), err=result.outcome is Outcome.REFUSED)
    _end_for(list(dict.fromkeys(problem for result in results for problem in result.problems)))
    if Outcome.REFUSED in outcomes:
        raise typer.Exit(EXIT_FAILED)
    if Outcome.IN_PROGRESS in outcomes:
        raise typer.Exit(EXIT_INCOMPLETE)


def main() -> Any:
    """Run the command; an error of ours is a message, not a traceback."""
    with printing("kvcached"):
        try:
            return app()
        except KVCachedError as error:
            typer.echo(f"kvcached: {error}", err=True)
            sys.exit(EXIT_FAILED)
