"""The tables of the gateway's files in docs/configuration.md, as the code has them.

`python tests/helpers/gateway_tables.py` writes them there.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kvcached_core.units import format_bytes
from kvcached_gateway.settings.config import (
    Environment,
    KvSettings,
    MemorySettings,
    ModelSettings,
    PlacementSettings,
    ServiceClass,
    Settings,
)
from kvcached_gateway.settings.keys import Key
from kvcached_gateway.settings.tables import Values

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"
SECTION = "## The gateway's files\n"
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
TABLES: dict[str, type[Values]] = {
    "The file": Settings,
    "environments": Environment,
    "models": ModelSettings,
    "kv": KvSettings,
    "classes": ServiceClass,
    "memory": MemorySettings,
    "placement": PlacementSettings,
    "The keys file": Key,
}
DEFAULTS_ROW = "| `defaults` | - | what models have that do not say it themselves (below) |"


def rows(title: str) -> list[str]:
    """Return the lines of a table."""
    return ["| key | default | meaning |", "|---|---|---|", *_rows(TABLES[title])]


def _rows(table: type[Values]) -> Iterator[str]:
    for key, name in table.keys().items():
        field = table.model_fields[name]
        if key == "models" and table is Settings:
            yield DEFAULTS_ROW
        yield f"| `{key}` | {_default(name, field)} | {_words(field)}{field.description} |"


def _words(field: FieldInfo) -> str:
    """Return the words that the value may be, where it is one of some."""
    words = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return f"{', '.join(f'`{word}`' for word in words)}: " if words else ""


def _default(name: str, field: FieldInfo) -> str:
    value: Any = field.default
    if field.is_required():
        return "(needed)"
    if value is PydanticUndefined or value in (None, ()) or isinstance(value, Values):
        return "-"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if name.endswith("_bytes"):
        return f"`{format_bytes(value).replace(' ', '')}`"
    return f"`{value:g}s`" if name.endswith("_seconds") else f"`{value}`"


def tables(document: str) -> list[str]:
    """Return the tables of the section about the gateway, in its order."""
    return TABLE.findall(document.split(SECTION)[1])


def written(document: str) -> str:
    """Return a document with the tables of now in the place of its own."""
    before, section = document.split(SECTION)
    now = iter(TABLES)
    return before + SECTION + TABLE.sub(lambda _: "\n".join(rows(next(now))) + "\n", section)


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
