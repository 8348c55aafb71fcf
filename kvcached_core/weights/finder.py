"""Who uses a storage: every tensor that Python knows, wherever it is kept."""

import gc
from collections.abc import Collection, Iterator
from typing import Any

import torch


def key_of(tensor: Any) -> int | None:
    """Return what names a tensor's storage while it lives, or None if it has none of its own."""
    try:
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001  parameters may override it
            return int(tensor.untyped_storage()._cdata)  # noqa: SLF001  storages have no other name
    except (NotImplementedError, RuntimeError):  # sparse, nested, batched, ...
        return None


def parts_of(name: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    """Yield the tensor, or the tensors that it wraps, each with its name."""
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    for inner in flatten(tensor)[0]:
        yield from parts_of(f"{name}.{inner}", getattr(tensor, inner))


def tensors_over(keys: Collection[int]) -> dict[int, list[Any]]:
    """Return, for each of these storages, all live tensors that lie in it.

    What is found: whatever was a Python object once, in an attribute, a list, a closure, a frame,
    or as what a view was made of. What C++ made for itself is not. It takes some tenths of a second
    per million objects.

    Args:
        keys: Storages, as `key_of` names them.
    """
    found: dict[int, list[Any]] = {key: [] for key in keys}
    for thing in tracked_tensors():
        if (key := key_of(thing)) in found:
            found[key].append(thing)
    return found


def tracked_tensors() -> list[Any]:
    """Return all live tensors that Python knows, wherever they are kept."""
    # not isinstance: that asks a proxy for its class, and some import a library to answer
    return [thing for thing in _tracked_objects() if issubclass(type(thing), torch.Tensor)]


def _tracked_objects() -> list[Any]:
    """Return all objects of the collector, with those that an engine froze."""
    if not gc.get_freeze_count():
        return gc.get_objects()
    gc.unfreeze()
    try:
        return gc.get_objects()
    finally:
        gc.freeze()
