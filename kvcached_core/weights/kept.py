"""Finished copies that a start may have its weights from: found by where these come from."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from kvcached_core.weights.copies_folder import RECORD
from kvcached_core.weights.key import LAYOUT_VERSION, Loaded
from kvcached_core.weights.record import Shape, read_words


def find_kept(folders: Iterable[Path], origin: str) -> tuple[Shape, Loaded] | None:
    """Return the copy that was used last, of those of weights of this origin.

    Nothing of it is believed yet but what it is of.

    Args:
        folders: Where copies lie; they may be missing. What an earlier one says of a copy counts.
        origin: What decides the weights, see `origin_digest`.
    """
    found: dict[str, tuple[int, Shape]] = {}
    for folder in folders:
        for used_ns, shape in _records(folder):
            found.setdefault(shape.key.digest, (used_ns, shape))
    kept = [
        (used_ns, shape.key.digest, shape, shape.loaded)
        for used_ns, shape in found.values()
        if shape.loaded is not None and shape.loaded.origin == origin
    ]
    if not kept:
        return None
    _, _, shape, loaded = max(kept, key=lambda one: one[:2])
    return shape, loaded


def _records(folder: Path) -> Iterator[tuple[int, Shape]]:
    """Yield when each record says that its copy was used, and what the copy is of."""
    for record in folder.glob(f"*{RECORD}"):
        read = read_words(record)
        if read is None:
            continue  # it is of no use for this; whoever opens the copy says what is wrong
        shape, words = read
        if (
            shape.key.digest == record.stem
            and min(shape.page_bytes, shape.num_pages) > 0
            and words.get("version") == LAYOUT_VERSION
        ):
            try:
                yield record.lstat().st_mtime_ns, shape
            except OSError:
                continue
