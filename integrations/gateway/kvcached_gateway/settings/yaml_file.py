"""YAML as text, lists and tables, with the line of each: what a value means its field decides.

So `revision: 012` stays as it is written. No aliases, no tags, and each key once.
"""

import re
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import yaml

from kvcached_core.errors import ConfigError
from kvcached_gateway.settings.mistakes import Mistake, Path

_NULL = "tag:yaml.org,2002:null"
_PLAIN = {_NULL, *(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))}
MAX_DEPTH = 20


@dataclass(frozen=True)
class Document:
    """A file as it was read.

    Attributes:
        file: Where it was read from.
        values: Text, None, lists, and tables by text.
        lines: The line of each value, by its path.
    """

    file: FilePath
    values: Any
    lines: dict[Path, int]

    def error(self, mistake: Mistake) -> ConfigError:
        """Return the error that says a mistake of this file, with its line."""
        path = mistake.path
        while path and path not in self.lines:
            path = path[:-1]
        line = f", line {self.lines[path]}" if path in self.lines else ""
        return ConfigError(f"{self.file}{line}: {mistake.sentence()}")

    def has(self, path: Path) -> bool:
        """Return whether the file says something there."""
        return path in self.lines


class _Loader(yaml.SafeLoader):
    """A loader to which each scalar is text, but for nothing at all."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's own table, with one line left
        first: [(_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"))] for first in ("~", "n", "N", "")
    }


def parse_yaml(file: FilePath, text: str) -> Document:
    """Return what a file says.

    Args:
        file: Where it was read from, for the errors.
        text: Its content.

    Raises:
        ConfigError: If it is no YAML, or has aliases, tags, or a key twice.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}{line}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    document = Document(file, {}, {})
    try:
        values = {} if node is None else _Reader(document.lines).values(node, ())
    except Mistake as mistake:
        raise document.error(mistake) from None
    return Document(file, values, document.lines)


class _Reader:
    """Turns nodes into values, and writes down their lines."""

    def __init__(self, lines: dict[Path, int]) -> None:
        self._lines = lines
        self._seen: set[int] = set()

    def values(self, node: yaml.Node, path: Path) -> Any:
        self._lines.setdefault(path, node.start_mark.line + 1)
        if id(node) in self._seen:
            raise Mistake(path, "is an alias; write it out, or use `defaults`")
        self._seen.add(id(node))
        if node.tag not in _PLAIN:
            raise Mistake(path, f"has the tag {node.tag}; tags are not allowed")
        if len(path) > MAX_DEPTH:
            raise Mistake(path[:3], "is nested too deeply")
        if isinstance(node, yaml.ScalarNode):
            _check_text(node.value, path)
            return None if node.tag == _NULL else node.value
        if isinstance(node, yaml.SequenceNode):
            return [self.values(item, (*path, place)) for place, item in enumerate(node.value)]
        return self._table(node, path)

    def _table(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _PLAIN:
                raise Mistake(path, "has a key that is no plain text")
            _check_text(key.value, path)
            here = (*path, key.value)
            line = key.start_mark.line + 1
            if key.value in found:
                first, self._lines[here] = self._lines[here], line
                raise Mistake(here, f"is there twice, first in line {first}")
            self._lines[here] = line
            found[key.value] = self.values(value, here)
        return found


def _check_text(text: str, path: Path) -> None:
    """Refuse what no path, variable or argument can have."""
    if "\0" in text:
        raise Mistake(path, "has a NUL, which ends a text for the system; remove it")
