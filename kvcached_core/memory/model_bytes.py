"""How many bytes a model's weights take on a rank: from its files, or from its shape.

An engine that starts asks its neighbours for this much room before it loads, so a number that is
too small ends the start and one that is too large takes caches for nothing. Nothing of a file but
its size is read, and a weight index.
"""

import json
from pathlib import Path
from typing import Any

from kvcached_core.memory.hub_cache import cached_folder
from kvcached_core.memory.model_shape import ModelBytes, shape_bytes, stored_element_bytes
from kvcached_core.units import GIB

# What an engine allocates beside weights before its KV cache: CUDA context, libraries, activations
# of the profile run and CUDA graphs, about 2 GiB for an 8B model. What is wrong with it the
# headroom has to bear.
OTHER_BYTES = 2 * GIB

# What holds a model's weights, the kind that engines prefer first. A folder may hold several
# copies; `*.index.json` names the files of one.
KINDS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
# Other files of these kinds, and a second copy in the words of the original authors.
NO_WEIGHTS = ("adapter_", "training_args", "optimizer", "scheduler", "scaler", "rng_state")
SECOND_COPY = "consolidated"


def model_bytes(model: str, config: Any, dtype_bytes: int, **where: Any) -> ModelBytes:
    """Return what a model takes: from its files where they are here, else from its shape.

    Args:
        model: A folder, a file, or a name on a hub of which a copy may be in the local cache.
        config: Its configuration, with the names of `transformers`; an object or a mapping.
        dtype_bytes: What an element takes that is not quantised, in bytes.
        **where: `revision` and `cache_dir`, as for `find_folder`.
    """
    by_shape = shape_bytes(config, dtype_bytes)
    folder = find_folder(model, **where)
    stored_bytes = files_bytes(folder) if folder is not None else 0
    if not stored_bytes:
        return by_shape
    if element_bytes := stored_element_bytes(config):  # engines convert it
        stored_bytes = stored_bytes * dtype_bytes // element_bytes
    return by_shape.scaled_to(stored_bytes)


def find_folder(
    model: str, revision: str | None = None, cache_dir: str | None = None
) -> Path | None:
    """Return where the files of a model are on this machine, or None. Nothing is downloaded."""
    path = Path(model)
    if path.exists():
        return path
    try:
        # Both engines bring it, and only one that starts needs it.
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415
        from huggingface_hub.errors import HFValidationError  # noqa: PLC0415
    except ImportError:
        return cached_folder(model, revision, cache_dir)
    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision, cache_dir=cache_dir)
    except (HFValidationError, ValueError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def files_bytes(folder: Path) -> int:
    """Return the size of one copy of the weights in `folder`, or 0 if there is none.

    Args:
        folder: A folder, or a single file of weights.
    """
    if folder.is_file():
        return folder.stat().st_size
    for kind in KINDS:
        files = [file for file in folder.glob(kind) if not file.name.startswith(NO_WEIGHTS)]
        first = [file for file in files if not file.name.startswith(SECOND_COPY)]
        if files:
            indexed = _indexed_files(folder, kind)
            own = [file for file in files if file.name in indexed] or first or files
            return sum(file.stat().st_size for file in own)
    return 0


def _indexed_files(folder: Path, kind: str) -> set[str]:
    for index in folder.glob(f"{kind}.index.json"):
        try:
            return set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            continue
    return set()
