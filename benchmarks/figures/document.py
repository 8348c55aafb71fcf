"""A document's numbers: which are what a record says, which are settings, and which neither."""

import re
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from figures.sentence import HERE, NUMBER, Sentence, all_sentences, pattern, words_pattern
from figures.value import RESULTS

ROOT = HERE.parents[1]
LAB = ROOT / "docs" / "lab"
DOCUMENTS = (
    "README.md",
    "docs/benchmarks.md",
    "docs/index.md",
    "docs/scaling.md",
    "docs/support.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in LAB.glob("*.md")),
)

RELEASED = ("ADR", "CUDA", "FlashAttention", "Gemma", "Python", "SGLang", "torch", "vLLM")
# What a number belongs to that is no result, with a reason each.
LISTING = r"(?m)^ {4} *\S[^\n]*$"  # commands and output that a document quotes, indented
NAMES = (
    r"```.*?```",  # the same between marks
    r"`[^`]*`",  # names in code
    r"\]\([^)]*\)",  # addresses of links
    r"<[^>\n]*>",  # HTML
    r"\d{4}-\d\d-\d\d",  # dates
    r"\b\d+(?:\.\d+){2,}(?:\.post\d+)?(?:\+\w+)?",  # releases of three parts
    rf"\b(?:{'|'.join(RELEASED)})\s+\d[\d.]*(?: to \d[\d.]*\d)?",  # releases
    r"\b\d+/\d+\b(?! s)",  # a load's shape: tokens in and out
)
LETTERS_BEFORE = r"(?<![\w.,-])"


@dataclass(frozen=True)
class Setting:
    """Words with numbers that no run measured: what was asked for, a size, a bar.

    Attributes:
        texts: The words, wherever they stand.
        reason: Why no record says them.
    """

    texts: list[str]
    reason: str


def read_settings(folder: Path = HERE) -> list[Setting]:
    """Return the settings of every file of the folder."""
    return [
        Setting(**entry)
        for path in sorted(folder.glob("*.toml"))
        for entry in tomllib.loads(path.read_text()).get("setting", [])
    ]


def section_of(text: str, heading: str) -> tuple[int, int]:
    """Return where a section begins and ends; the whole text for no heading.

    Raises:
        ValueError: If no heading of the document says that.
    """
    if not heading:
        return 0, len(text)
    heads = [match.start() for match in re.finditer(r"(?m)^#+ .*$", text)]
    for start, end in pairwise([*heads, len(text)]):
        line = text[start:].partition("\n")[0]
        if line.lstrip("# ") == heading:
            return start, end
    raise ValueError(f"no heading {heading!r}")


def find(sentence: Sentence, text: str, results: Path = RESULTS) -> list[re.Match[str]]:
    """Return where a document says a sentence as the records have it."""
    start, end = section_of(text, sentence.section)
    return list(pattern(sentence.pieces(results)).finditer(text, start, end))


def wrong_figures(
    text: str, sentences: list[Sentence], results: Path = RESULTS
) -> list[tuple[Sentence, str]]:
    """Return the sentences that a document does not say, each with what it says in its place."""
    wrong = []
    for sentence in sentences:
        if not find(sentence, text, results):
            start, end = section_of(text, sentence.section)
            loose = pattern(sentence.pieces(results), any_number=True)
            other = loose.search(text, start, end)
            wrong.append(
                (sentence, " ".join(other.group().split()) if other else "nothing like it")
            )
    return wrong


def numbers_without_a_record(
    text: str, sentences: list[Sentence], settings: list[Setting], results: Path = RESULTS
) -> list[str]:
    """Return each number of a document, with its line, that is neither a figure nor a setting."""
    left = _blank_all(text, LISTING)
    for sentence in sentences:
        for match in find(sentence, text, results):
            left = _blank_figures(left, match)
    for words in (words for setting in settings for words in setting.texts):
        left = _blank_all(left, rf"(?<![\w.]){words_pattern(words)}(?!\w|\.\d)")
    for name in NAMES:
        left = _blank_all(left, name, re.DOTALL)
    left = _blank_bars(left)
    return [
        f"{match.group()!r} in line {left.count(chr(10), 0, match.start()) + 1}: "
        + " ".join(_line_at(text, match.start()).split())
        for match in re.finditer(rf"{LETTERS_BEFORE}{NUMBER}(?!\w|-[A-Za-z])", left)
    ]


def _blank_figures(text: str, match: re.Match[str]) -> str:
    """Blank the figures of a sentence, and of a table's row also the cells that name them."""
    if match.group().startswith("|"):
        text = _blank(text, match.start(), match.start(1))
    for group in range(1, len(match.groups()) + 1):
        text = _blank(text, *match.span(group))
    return text


def _blanks(text: str) -> str:
    """Return blanks for a text; lines and cells of tables stay."""
    return re.sub(r"[^\s|]", " ", text)


def _blank(text: str, start: int, end: int) -> str:
    return text[:start] + _blanks(text[start:end]) + text[end:]


def _blank_all(text: str, words: str, flags: int = 0) -> str:
    return re.sub(words, lambda match: _blanks(match.group()), text, flags=flags)


def _blank_bars(text: str) -> str:
    """Blank the columns of tables whose head begins with `bar`: what was aimed at."""
    lines = text.split("\n")
    column: int | None = None
    for number, line in enumerate(lines):
        cells = line.split("|")
        if not line.startswith("|"):
            column = None
        elif not lines[number - 1].startswith("|"):
            names = [cell.strip() for cell in cells]
            heads = (place for place, name in enumerate(names) if name.startswith("bar"))
            column = next(heads, None)
        elif column is not None and column < len(cells):
            cells[column] = " " * len(cells[column])
            lines[number] = "|".join(cells)
    return "\n".join(lines)


def _line_at(text: str, position: int) -> str:
    return text[text.rfind("\n", 0, position) + 1 :].partition("\n")[0]


def rewritten(text: str, sentences: list[Sentence], results: Path = RESULTS) -> str:
    """Return a document with the records' figures in the place of others, where words agree."""
    for sentence in sentences:
        if find(sentence, text, results):
            continue
        pieces = sentence.pieces(results)
        figures = [piece.text for piece in pieces if piece.is_figure]
        start, end = section_of(text, sentence.section)
        match = pattern(pieces, any_number=True).search(text, start, end)
        if match:
            for group, figure in reversed(list(enumerate(figures, 1))):
                first, last = match.span(group)
                text = text[:first] + figure + text[last:]
    return text


def report(*, write: bool = False) -> list[str]:
    """Return what is wrong in the documents; with `write` mend figures first, where words agree."""
    sentences, settings = all_sentences(), read_settings()
    found = []
    for name in DOCUMENTS:
        path = ROOT / name
        own = [sentence for sentence in sentences if sentence.document == name]
        if write:
            path.write_text(rewritten(path.read_text(), own))
        text = path.read_text()
        found += [
            f"{name}: the record says {sentence.rendered()!r}, the document {other!r}"
            for sentence, other in wrong_figures(text, own)
        ]
        found += [
            f"{name}: no record says {number}"
            for number in numbers_without_a_record(text, own, settings)
        ]
    return found
