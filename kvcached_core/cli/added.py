"""What other packages say of instances: what people call them, and more columns for `top`."""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

# A package names a function here that takes the folder of the ledgers and returns `Added`s.
GROUP = "kvcached.instances"


@dataclass(frozen=True)
class Added:
    """What a package says of one instance.

    Attributes:
        name: What its users call it; a command takes this name, too.
        instance: Its name in the ledger, whether or not it is there now.
        cells: What `top` shows of it, by the title of the column.
        state: One word for an instance that is not there, such as `cold`.
    """

    name: str
    instance: str
    cells: Mapping[str, str] = field(default_factory=dict)
    state: str = ""


def added(directory: Path) -> list[Added]:
    """Return what packages say of instances; one whose package fails says nothing."""
    found: list[Added] = []
    for function in _functions():
        with suppress(Exception):  # another package's: it shall not end `top`
            found.extend(function(directory))
    return found


def instance_named(name: str, directory: Path) -> str:
    """Return the name in the ledger of what people call `name`."""
    return next((each.instance for each in added(directory) if each.name == name), name)


@functools.cache
def _functions() -> list[Callable[[Path], Iterable[Added]]]:
    found = []
    for entry in entry_points(group=GROUP):
        with suppress(Exception):  # a broken package harms no command
            found.append(entry.load())
    return found
