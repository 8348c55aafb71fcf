"""What was moved between host memory and a disk, as all processes of a folder count it together."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from kvcached_core.errors import HostCopyError
from kvcached_core.weights.folder_lock import locked

MOVES, NEW_MOVES = "moves", "moves-new"


@dataclass(frozen=True)
class Moves:
    """What all processes moved between host memory and one disk.

    Attributes:
        num_written: Images that went to the disk.
        written_bytes: Their bytes.
        write_seconds: What it took, added up.
        num_read: Images that came back.
        read_bytes: Their bytes.
        read_seconds: What it took, added up.
        num_spoiled: Images that came back with other bytes, and were removed.
    """

    num_written: int = 0
    written_bytes: int = 0
    write_seconds: float = 0.0
    num_read: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0
    num_spoiled: int = 0


def read_moves(folder: Path) -> Moves:
    """Return what was moved so far; nothing where nobody has counted."""
    try:
        words = json.loads((folder / MOVES).read_bytes())
        return Moves(**{field.name: words[field.name] for field in fields(Moves)})
    except (OSError, ValueError, TypeError, KeyError):
        return Moves()


def count_moves(folder: Path, more: Moves) -> None:
    """Add to what was moved; it is for people, so what cannot be written is left."""
    with suppress(OSError, HostCopyError), locked(folder):
        before, added = asdict(read_moves(folder)), asdict(more)
        new = folder / NEW_MOVES
        new.write_text(json.dumps({name: before[name] + added[name] for name in before}))
        new.replace(folder / MOVES)
