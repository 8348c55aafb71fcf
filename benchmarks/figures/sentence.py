"""A sentence, or a table's row, with figures in it, and where it stands in a document.

The text has fields as `str.format` has them: `{ratio:.3f} ({ratio.min:.3f} to {ratio.max:.3f})`.
Numbers outside of fields are not from a record: the document's check asks for a reason for each.
"""

import re
import string
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from figures.value import RESULTS, Spread, evaluate

HERE = Path(__file__).parent
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?"


@dataclass(frozen=True)
class Piece:
    """A part of a sentence; `is_figure` if a record says it."""

    text: str
    is_figure: bool


@dataclass(frozen=True)
class Sentence:
    """Words with figures.

    Attributes:
        document: The file's path from the root of the repository.
        section: The heading that it stands under, or nothing for anywhere.
        text: The words, with fields.
        values: What each field stands for: a path and its words.
    """

    document: str
    section: str
    text: str
    values: dict[str, str]

    def pieces(self, results: Path = RESULTS) -> list[Piece]:
        """Return the sentence as the records have it."""
        spreads = {name: evaluate(spec, results) for name, spec in self.values.items()}
        return list(_pieces(self.text, spreads))

    def rendered(self, results: Path = RESULTS) -> str:
        """Return the sentence as the document has to say it."""
        return "".join(piece.text for piece in self.pieces(results))


def _pieces(text: str, spreads: dict[str, Spread]) -> Iterator[Piece]:
    for literal, field, spec, _ in string.Formatter().parse(text):
        yield Piece(literal, is_figure=False)
        if field is not None:
            name, _, end = field.partition(".")
            value = getattr(spreads[name], end) if end else spreads[name]
            yield Piece(format(value, spec or ""), is_figure=True)


def pattern(pieces: list[Piece], *, any_number: bool = False) -> re.Pattern[str]:
    """Return what finds a sentence: a line may end at any blank, each figure is a group.

    Args:
        pieces: The sentence.
        any_number: Find it with other figures in it, too.
    """
    return re.compile("".join(_part(piece, any_number=any_number) for piece in pieces))


def _part(piece: Piece, *, any_number: bool) -> str:
    if piece.is_figure:
        return f"({NUMBER if any_number else re.escape(piece.text)})"
    return words_pattern(piece.text)


def words_pattern(words: str) -> str:
    """Return a pattern for words between which a line may end."""
    return re.sub(r"(?:\\\s)+", r"\\s+", re.escape(words))


def read_sentences(path: Path) -> list[Sentence]:
    """Return the sentences in a TOML file.

    An entry with `each` is one sentence for each of its rows, with `by` for each pair of a row of
    the one and a row of the other. Either may be the name of rows that stand under `[rows]`.
    """
    entries = tomllib.loads(path.read_text())
    rows = entries.get("rows", {})
    return [
        _sentence(entry, entries.get("document", ""), one | other)
        for entry in entries.get("figure", [])
        for one, other in product(*(_rows(entry.get(key, [{}]), rows) for key in ("each", "by")))
    ]


def _rows(named: Any, rows: dict[str, Any]) -> list[dict[str, str]]:
    return rows[named] if isinstance(named, str) else named


def _sentence(entry: dict[str, Any], document: str, row: dict[str, str]) -> Sentence:
    filled = {"record": entry.get("record", "")} | row
    return Sentence(
        document=entry.get("document", document),
        section=_fill(entry.get("section", ""), filled),
        text=_fill(entry["text"], filled),
        values={name: _fill(spec, filled) for name, spec in entry["values"].items()},
    )


def _fill(text: str, row: dict[str, str]) -> str:
    """Put a row's words in the place of `<name>`."""
    return re.sub(r"<(\w+)>", lambda match: row[match.group(1)], text)


def all_sentences(folder: Path = HERE) -> list[Sentence]:
    """Return the sentences of every file of the folder."""
    return [sentence for path in sorted(folder.glob("*.toml")) for sentence in read_sentences(path)]
