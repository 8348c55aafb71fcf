"""What a check saw, in a file, whatever became of the check."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written(path: Path) -> Iterator[dict[str, Any]]:
    """Write what is put into the facts inside to a file, also when the block is left early."""
    facts = dict[str, Any]()
    try:
        yield facts
    finally:
        path.write_text(json.dumps(facts, indent=1))
