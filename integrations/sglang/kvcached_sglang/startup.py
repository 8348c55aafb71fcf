"""Whether we can serve this SGLang elastically, decided once before anything is changed."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from kvcached_core.config import SWITCH, Enable, read_config, read_switch
from kvcached_core.engine import refusal
from kvcached_core.engine.leaving import sweep_at_exit
from kvcached_core.engine.names import safe_name
from kvcached_core.errors import ConfigError, GeometryError, UnsupportedEngineError
from kvcached_patches import (
    Installed,
    Patcher,
    check_installed,
    find_installed,
    hooks_of,
    report,
)
from kvcached_patches import sglang as table
from kvcached_sglang.obstacles import argument_obstacles, model_obstacles

logger = logging.getLogger("sglang.kvcached")
refuse = partial(refusal.refuse, engine="SGLang", logger=logger)

# Says to the processes that this one starts that the source files were checked already.
CHECKED = "_KVCACHED_SGLANG_CHECKED"

# The exit code of a scheduler's process that has said why it ends, or whose first rank has.
SAID = 78

_flags: Patcher | None = None
_patcher: Patcher | None = None


def add_flags() -> None:
    """Add `--enable-kvcached` and its companions to SGLang's arguments."""
    global _flags  # noqa: PLW0603  one process, one set of hooks
    if _flags is None:
        _flags = Patcher(table.FLAG_HOOKS)
        _flags.apply()


def start() -> None:
    """Check the release and hook it if the switch is on; `SystemExit` where that cannot be.

    SGLang's plugin loader swallows exceptions; `SystemExit` is none that it catches.
    """
    global _patcher  # noqa: PLW0603  one process, one set of hooks
    try:
        if read_switch() is Enable.OFF:
            return
        config = read_config()
        if _patcher is not None:
            return
        engine = installed()
        if os.environ.get(CHECKED) != engine.release:
            check_release(engine)
    except ConfigError as error:
        raise SystemExit(f"kvcached: {error}") from error
    except UnsupportedEngineError as error:
        refuse(error)
        return
    os.environ[CHECKED] = engine.release
    sweep_at_exit(config.dir)
    _patcher = Patcher(
        hooks_of(engine, table.HOOKS),
        on_misfit=lambda error: refuse(UnsupportedEngineError(str(error))),
    )
    _patcher.apply()


def installed() -> Installed:
    """Return the installed SGLang.

    Raises:
        UnsupportedEngineError: If there is none.
    """
    found = find_installed(table.OLDEST_RELEASES, table.PACKAGE)
    if found is None:
        raise UnsupportedEngineError(
            "no SGLang is installed; install it into this environment, or unset ENABLE_KVCACHED"
        )
    return found


def check_release(engine: Installed) -> None:
    """Refuse a release that has no lock or is not what its lock says.

    Raises:
        UnsupportedEngineError: With every finding, and what to do.
    """
    findings = check_installed(engine, table.LOCKED)
    if findings:
        raise UnsupportedEngineError(report("SGLang", engine, findings))


def is_on() -> bool:
    """Return whether this process is hooked, and has not been told since to go on without us."""
    return _patcher is not None and read_switch() is not Enable.OFF


def check_arguments(arguments: Any) -> None:
    """Refuse what the arguments alone can tell, before anything of the engine is made.

    Args:
        arguments: What was parsed, or a `ServerArgs`.

    Raises:
        SystemExit: With every reason and the setting to change; under `auto` it only warns.
    """
    if is_on():
        try:
            refusal.check_configuration(argument_obstacles(arguments))
        except UnsupportedEngineError as error:
            refuse(error)


def check_model(runner: Any) -> None:
    """Refuse what cannot be served elastically yet, before the weights are loaded.

    Args:
        runner: SGLang's model runner.

    Raises:
        UnsupportedEngineError: With every reason and the setting to change.
    """
    found = [*argument_obstacles(runner.server_args), *model_obstacles(runner)]
    refusal.check_configuration(dict.fromkeys(found))


def refuse_in_rank(error: UnsupportedEngineError) -> None:
    """Refuse what every rank finds alike: the first one says so."""
    if is_first_rank():
        refuse(error)
    elif read_switch() is Enable.AUTO:
        os.environ[SWITCH] = "0"
    else:
        raise SystemExit(SAID) from error


@contextmanager
def one_message() -> Iterator[None]:
    """End the process with one message where a start fails inside; see `refusal.one_message`.

    What every rank finds alike the first one says.
    """
    try:
        with refusal.one_message("SGLang"):
            yield
    except SystemExit as error:
        is_alike = isinstance(error.__cause__, ConfigError | GeometryError | UnsupportedEngineError)
        if is_alike and not is_first_rank():
            raise SystemExit(SAID) from error
        raise


def end(message: object) -> NoReturn:
    """End the process for what every rank finds alike: the first one says so.

    SGLang catches exceptions where it makes its pools; `SystemExit` is none that it catches.
    """
    raise SystemExit(f"kvcached: {message}" if is_first_rank() else SAID)


def is_first_rank() -> bool:
    """Return whether this process is a server's only one, or its first rank."""
    from torch import distributed

    return not distributed.is_initialized() or distributed.get_rank() == 0


def model_name(server_args: Any) -> str:
    """Return the last part of the model's name or path."""
    return safe_name(Path(str(server_args.served_model_name or server_args.model_path)).name)
