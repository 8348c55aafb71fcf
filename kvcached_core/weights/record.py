"""The record of an image: what it holds, and the sums by which its bytes are believed."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvcached_core.weights.copies_folder import NEW_RECORD
from kvcached_core.weights.key import LAYOUT_VERSION, CopyKey, Loaded

PageSums = tuple[int, int]  # of the words of a page: pages with other bytes have other sums


@dataclass(frozen=True)
class Shape:
    """What a file has to hold.

    Attributes:
        key: Of which weights.
        page_bytes: The size of a page.
        num_pages: How many there are.
        loaded: What the model is with these weights, where a start may have them from here.
    """

    key: CopyKey
    page_bytes: int
    num_pages: int
    loaded: Loaded | None = field(default=None, compare=False)

    @property
    def num_bytes(self) -> int:
        """All pages."""
        return self.page_bytes * self.num_pages


def words_of(shape: Shape, sums: Sequence[PageSums], checksums: Sequence[int]) -> dict[str, Any]:
    """Return all that a record says.

    Args:
        shape: What the image holds.
        sums: Of each page, as the device has it.
        checksums: Of each page, as the image has it.
    """
    loaded = shape.loaded
    words = _expected(shape) | {"sums": sums, "checksums": checksums}
    return words | {"loaded": None if loaded is None else asdict(loaded)}


def write_record(record: Path, words: dict[str, Any], *, is_durable: bool = False) -> None:
    """Put a record in its place, all at once.

    Args:
        record: Where it lies.
        words: What it says.
        is_durable: Whether it has to outlive the machine's power.

    Raises:
        OSError: If it cannot be written; what was there before stays.
    """
    new = record.with_suffix(NEW_RECORD)
    new.write_text(json.dumps(words))
    if is_durable:
        fsync_path(new)
    new.replace(record)


def _expected(shape: Shape) -> dict[str, Any]:
    """Return what a record says beside the sums, and what it has to say to be believed."""
    return {
        "version": LAYOUT_VERSION,
        "key": shape.key.digest,
        "name": shape.key.name,
        "num_bytes": shape.num_bytes,
        "page_bytes": shape.page_bytes,
        "num_pages": shape.num_pages,
    }


def fsync_path(path: Path) -> None:
    """Return when what was written to a file, or in a folder, outlives the machine's power."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def believed(
    shape: Shape, record: Path, num_bytes: int
) -> tuple[list[PageSums] | None, list[int], str]:
    """Return the sums and checksums that a record says, or why it is not believed.

    Args:
        shape: What the image has to hold.
        record: The record.
        num_bytes: The size of the image.
    """
    if num_bytes != shape.num_bytes:
        return None, [], f"it has {num_bytes} bytes, expected are {shape.num_bytes}"
    try:
        words = json.loads(record.read_bytes())
        sums = [(int(rows), int(columns)) for rows, columns in words["sums"]]
        checksums = [int(checksum) for checksum in words["checksums"]]
    except FileNotFoundError:
        return None, [], "whoever filled it was ended before it was whole"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return None, [], f"{record.name} cannot be read: {error!r}"
    problem = ""
    for word, expected in _expected(shape).items():
        if word != "name" and words.get(word) != expected:
            problem = f"{record.name} says {word} {words.get(word)}, expected is {expected}"
    if not len(sums) == len(checksums) == shape.num_pages:
        problem = f"{record.name} has not one sum for each of {shape.num_pages} pages"
    return (None, [], problem) if problem else (sums, checksums, "")


def read_words(record: Path) -> tuple[Shape, dict[str, Any]] | None:
    """Return what an image holds as its record says it, and all of the record; None if it cannot.

    Nothing of it is believed yet.
    """
    try:
        words = json.loads(record.read_bytes())
        loaded = words.get("loaded")
        key = CopyKey(str(words["key"]), str(words["name"]))
        return (
            Shape(
                key,
                int(words["page_bytes"]),
                int(words["num_pages"]),
                None if loaded is None else Loaded(**loaded),
            ),
            words,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def say_used(record: Path) -> None:
    """Note that an image was opened or left just now."""
    with suppress(OSError):  # it is removed, or never was there
        os.utime(record)
