"""Another model's weights in the place of a model's, in files that look the same from outside."""

import os
from collections.abc import Mapping
from pathlib import Path

from kvcached_core.config import read_config
from kvcached_core.weights.budgets import make_budget

WEIGHTS = "model.safetensors"


def put_other_weights(model: Path, other: Path) -> None:
    """Let the file of a model's weights have those of another, with the size and time that it had.

    Who reads it now has other tokens; who has not read it has not seen that.
    """
    file, before = model / WEIGHTS, (model / WEIGHTS).stat()
    file.write_bytes((other / WEIGHTS).read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def move_to_disk(environ: Mapping[str, str]) -> None:
    """Have the only host copy on the disk that settings name, and none in memory."""
    config = read_config(environ)
    budget = make_budget(config)
    budget.claim("another model", budget.budget_bytes).close()
    assert not list(config.copies_dir.glob("*.image"))


def spoil_copy(folder: Path) -> None:
    """Change one byte of the only host copy in a folder."""
    (image,) = folder.glob("*.image")
    with image.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))
