"""Where the files of a hub's model lie in the local cache, for who has no library of the hub."""

import os
import re
from contextlib import suppress
from pathlib import Path

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def cached_folder(
    model: str, revision: str | None = None, cache_dir: str | None = None
) -> Path | None:
    """Return the folder of a model in the local cache, or None. Nothing is downloaded.

    Args:
        model: Its name on the hub.
        revision: A branch, a tag or a commit; None is the main branch.
        cache_dir: The cache; None is where the hub's variables say.
    """
    if not _NAME.fullmatch(model):
        return None
    top = Path(cache_dir) if cache_dir else _cache()
    repository = top / f"models--{model.replace('/', '--')}"
    commit = revision or "main"
    with suppress(OSError):  # a commit has no file here
        commit = (repository / "refs" / commit).read_text().strip()
    folder = repository / "snapshots" / commit
    return folder if (folder / "config.json").is_file() else None


def _cache() -> Path:
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    if home := os.environ.get("HF_HOME"):
        return Path(home) / "hub"
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "huggingface" / "hub"
