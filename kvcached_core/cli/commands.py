"""Commands that other packages add to `kvcached`, each imported only when it is run."""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from kvcached_core.errors import KVCachedError

# A package names a function here whose parameters are declared as typer wants them.
GROUP = "kvcached.commands"
PANEL = "Commands of other packages"


class CommandError(KVCachedError, RuntimeError):
    """A command that another package adds cannot be loaded; the message says which and why."""


class AddedCommand(TyperCommand):
    """A command as its entry point names it: whoever only lists commands does not import it."""

    def __init__(self, entry: EntryPoint) -> None:
        package = entry.module.partition(".")[0]
        super().__init__(
            entry.name,
            help=f"Added by {package}; `kvcached {entry.name} --help` says more.",
            rich_help_panel=PANEL,
        )
        self._entry = entry

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Load the command and let it read its arguments.

        Raises:
            CommandError: If it cannot be loaded.
        """
        return self._load().make_context(*arguments, **options)

    def _load(self) -> Any:
        entry = self._entry
        try:
            function = entry.load()
            only = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            only.command(entry.name)(function)
            return typer.main.get_command(only)
        except Exception as error:
            raise CommandError(
                f"the command {entry.name!r} cannot be loaded from {entry.value}: "
                f"{type(error).__name__}: {error}; install its package again, or remove it"
            ) from error


class Commands(TyperGroup):
    """The commands of the core, and behind them those that other packages add."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        added = sorted(entry_points(group=GROUP).names - set(self.commands))
        return [*super().list_commands(ctx), *added]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of this name, or None; a name of the core's stays the core's."""
        found = super().get_command(ctx, cmd_name)
        if found is None:
            for entry in entry_points(group=GROUP, name=cmd_name):
                return AddedCommand(entry)
        return found
