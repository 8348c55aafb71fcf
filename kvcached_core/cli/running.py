"""`kvcached run`: a program that is no engine, with room on the devices that engines share."""

import os
from typing import Annotated

import typer

from kvcached_core.cli.options import Directory
from kvcached_core.errors import KVCachedError
from kvcached_core.units import (
    MAX_PRIORITY,
    MAX_SECONDS,
    MIN_PRIORITY,
    check_name,
    default_directory,
)

# As `env`, `nice` and `timeout` have it: what failed is not the command.
EXIT_NOT_RUN = 125
SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def run_program(
    command: Annotated[
        list[str], typer.Argument(help="What to run, and its arguments; `--` before it.")
    ],
    need: Annotated[
        str, typer.Option(help="What it will allocate of each device, such as 20GiB or 25%.")
    ],
    directory: Directory = default_directory(),
    device: Annotated[
        list[str] | None,
        typer.Option(help="A GPU's number or UUID, or host; again for each. It sees no other."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What `kvcached top` calls it.")] = None,
    priority: Annotated[
        int | None,
        typer.Option(min=MIN_PRIORITY, max=MAX_PRIORITY, help="Among those that make room."),
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0.0, max=MAX_SECONDS, help="Seconds to wait for the room.")
    ] = 30.0,
) -> None:
    """Make room for a program beside the engines, and run it; the room ends with it."""
    from kvcached_core.config import read_config
    from kvcached_core.program.choosing import choose_devices, environment
    from kvcached_core.program.run import run

    try:
        if name is not None:
            check_name(name, "--name")
        config = read_config().model_copy(update={"dir": directory})
        devices = choose_devices(device or [], os.environ, config)
        code = run(
            command,
            devices,
            config,
            need=need,
            name=name,
            priority=priority,
            wait_seconds=wait,
            environ=environment(devices, device or []),
        )
    except KVCachedError as error:
        typer.echo(f"kvcached: {error}", err=True)
        raise typer.Exit(EXIT_NOT_RUN) from error
    raise typer.Exit(code)
