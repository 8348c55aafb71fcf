"""Which weights a host copy holds: a name for bytes that are the same on every start.

The key is made of what decides the bytes and is known before they are read. What it misses, the
sums of the pages see: no copy is used whose sums are not those of the weights on the device.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import blake2s
from pathlib import Path
from typing import Any

# Grows with every change of what the same layout means, or of what is in a copy's record.
LAYOUT_VERSION = 2
# Configurations count, too: they decide scales, and how matrices are merged.
READ_SUFFIXES = {".bin", ".gguf", ".json", ".pt", ".pth", ".safetensors"}
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class CopyKey:
    """The key of a host copy.

    Attributes:
        digest: What its files are called: 32 hexadecimal digits.
        name: The model, for people: nothing is decided by it.
    """

    digest: str
    name: str


@dataclass(frozen=True)
class FileMark:
    """A file that weights are read from, without what is in it."""

    name: str
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Origin:
    """What decides the bytes of one rank's weights.

    Attributes:
        model: The folder, the file, or the name on a hub.
        revision: Which of the versions on a hub, where one was asked for.
        load_format: How the engine reads the model, in its own word.
        files: The files that it reads; none if there are none here, as with made-up weights.
        seed: Of made-up weights; it is left aside where there are files.
        dtype: The type of what is not quantised.
        quantization: How weights are quantised, in the engine's own word; None if they are not.
        part: Which model of an engine: its own, or that of a drafter.
        tensor_parallel: Number of ranks that share each layer, and which of them this is.
        pipeline_parallel: Number of stages, and which of them this is.
        engine: The engine and its release: another one may arrange the same weights otherwise.
        device: The kind of device and its architecture, for the same reason.
        layout_digest: Of names, sizes and places of all pieces in the image.
    """

    model: str
    dtype: str
    engine: str
    device: str
    layout_digest: str
    revision: str | None = None
    load_format: str = "auto"
    files: tuple[FileMark, ...] = ()
    seed: int = 0
    quantization: str | None = None
    part: str = "model"
    tensor_parallel: tuple[int, int] = (1, 0)
    pipeline_parallel: tuple[int, int] = (1, 0)


@dataclass(frozen=True)
class Loaded:
    """What a model was when it was loaded: a start that took it from a copy has to find the same.

    Attributes:
        origin: What decided its weights, see `origin_digest`.
        layout_digest: Of their layout.
        pieces: The fingerprint of each piece, in the layout's order.
        beside: What the model keeps beside its weights, by name; JSON can have all of it.
    """

    origin: str
    layout_digest: str
    pieces: Sequence[int]
    beside: Mapping[str, Any]


def copy_key(origin: Origin) -> CopyKey:
    """Return the key of the weights that come from `origin`."""
    name = short_name(origin.model)
    size, rank = origin.tensor_parallel[0] * origin.pipeline_parallel[0], _rank(origin)
    return CopyKey(_digest(origin), name if size == 1 else f"{name} (rank {rank} of {size})")


def origin_digest(origin: Origin) -> str:
    """Return the name of all that decides weights and is known before a model is made."""
    return _digest(replace(origin, layout_digest=""))


def _digest(origin: Origin) -> str:
    values = asdict(origin) | {"layout_version": LAYOUT_VERSION}
    if origin.files:
        del values["seed"]
    text = json.dumps(values, sort_keys=True)
    return blake2s(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def short_name(model: str) -> str:
    """Return what a model is called for people: the last part of its name or path."""
    return Path(model).name or model


def _rank(origin: Origin) -> int:
    (size, rank), (_, stage) = origin.tensor_parallel, origin.pipeline_parallel
    return stage * size + rank


def mark_files(path: Path | None) -> tuple[FileMark, ...]:
    """Return what tells the weights at `path` from changed ones, in the order of their names.

    Args:
        path: A folder, of which the files count that an engine reads weights from or decides by;
            one file; or None where a model has no files here.
    """
    if path is None:
        return ()
    files = [path] if path.is_file() else _files_of(path)
    marks = []
    for file in files:
        with suppress(FileNotFoundError):  # it went away meanwhile; a link is followed
            found = file.stat()
            marks.append(FileMark(file.name, found.st_size, found.st_mtime_ns))
    return tuple(sorted(marks, key=lambda mark: mark.name))


def _files_of(folder: Path) -> list[Path]:
    return [file for file in folder.glob("*") if file.suffix in READ_SUFFIXES]
