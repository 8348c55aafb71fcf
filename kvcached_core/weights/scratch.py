"""Large buffers of an engine's runner, moved to the annex: penalties, tables, workspaces."""

import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from kvcached_core.units import MIB
from kvcached_core.weights.annex import Annex, Ranges
from kvcached_core.weights.binding import Bound, Group, bind
from kvcached_core.weights.finder import key_of, tracked_tensors

# A smaller buffer is not worth a page; addresses of such are kept in tables, too.
LEAST_SCRATCH_BYTES = 8 * MIB
# A table of addresses is not larger.
MOST_ENTRIES = 1 << 12

Roots = Mapping[str, object]


class Scratch:
    """Buffers on the annex. Those that nobody uses any more do not come back.

    Args:
        annex: Where they lie.
    """

    def __init__(self, annex: Annex) -> None:
        self._annex = annex
        self._bound: dict[int, Bound] = {}
        self._forgotten = set[int]()

    def move(self, groups: list[Group], forgotten: Collection[str] = ()) -> int:
        """Move buffers to the annex; return their bytes. Graphs must not have been captured yet.

        Args:
            groups: What `find_scratch` found.
            forgotten: Attributes whose content is of no worth when nothing runs; they come back as
                zeros.

        Raises:
            BackendError: If there is no memory. What was moved before stays moved.
        """
        addresses: dict[str, int] = {}

        def place(name: str, num_bytes: int) -> Any:
            addresses[name] = address = self._annex.take(num_bytes, self)
            return self._annex.backend.tensor(address, num_bytes)

        binding = bind(groups, place)
        self._bound |= {addresses[name]: one for name, one in binding.bound.items()}
        names = [name for name in binding.bound if name.rpartition(".")[2] in forgotten]
        self._forgotten.update(addresses[name] for name in names)
        return binding.bound_bytes

    def in_use(self, spans: Mapping[int, int]) -> Mapping[int, Ranges]:
        """See `Tenant.in_use`: of each buffer that still is one all, if it is not forgotten."""
        self._bound = {
            address: one
            for address, one in self._bound.items()
            if address in spans and not one.storage.expired()
        }
        return {
            address: [] if address in self._forgotten else [(address, one.num_bytes)]
            for address, one in self._bound.items()
        }


def find_scratch(roots: Roots, packages: Collection[str], device: Any) -> list[Group]:
    """Return the buffers of an engine's runner of `LEAST_SCRATCH_BYTES` or more.

    It looks at what objects keep as attributes, or in containers, and goes on into those whose
    classes are of `packages`, and into modules of a model. What the modules of `packages` keep
    themselves is looked at, too. Parameters are not looked at. What torch
    did not allocate itself is left out, and so is memory that NumPy shares, and a buffer whose
    address stands in a table on the device or in an attribute.

    Args:
        roots: Where to begin, each with its name.
        packages: Names of modules of the engine, each with what is below it.
        device: Where buffers lie, as torch names it.
    """
    found = dict[int, Group]()
    numbers = set[int]()
    modules = {name: vars(module) for name, module in sys.modules.items() if _is_of(name, packages)}
    for name, value in walk({**roots, **modules}, packages, {int}):
        if type(value) is int:
            numbers.add(value)
            continue
        key = key_of(value) if _is_plain(value, device) else None
        if key is None:
            continue
        storage = value.untyped_storage()
        if storage.nbytes() >= LEAST_SCRATCH_BYTES and storage.resizable():
            found.setdefault(key, Group(name, storage.nbytes(), key, [])).tensors.append(value)
    if found:
        numbers.update(_addresses_in_tables(device))
    return [group for group in found.values() if not _is_named(group, numbers)]


def walk(
    roots: Roots, packages: Collection[str], kinds: Collection[type]
) -> Iterator[tuple[str, Any]]:
    """Yield tensors, and what is of some kinds, each with its name; parameters are left out.

    Args:
        roots: Where to begin, each with its name.
        packages: Names of modules of the engine, each with what is below it. It goes on into
            objects of their classes, into containers, and into modules of a model.
        kinds: Types of numbers.
    """
    seen = set[int]()
    waiting: list[tuple[str, Any]] = list(roots.items())
    while waiting:
        name, value = waiting.pop()
        kind = type(value)
        if kind in kinds or issubclass(kind, torch.Tensor):
            yield name, value
        elif id(value) not in seen:
            seen.add(id(value))
            inner = _inside(value, packages)
            waiting.extend((f"{name}.{key}", part) for key, part in reversed(inner))


def _inside(value: Any, packages: Collection[str]) -> list[tuple[Any, Any]]:
    kind = type(value)
    if issubclass(kind, dict):
        return list(value.items())
    if issubclass(kind, list | tuple):
        return list(enumerate(value))
    if issubclass(kind, torch.nn.Module):
        return [item for item in vars(value).items() if item[0] != "_parameters"]
    if issubclass(kind, type) or not _is_of(kind.__module__, packages):
        return []
    slots = [name for one in kind.__mro__ for name in getattr(one, "__slots__", ())]
    found = [(name, getattr(value, name, None)) for name in slots]
    return [*found, *getattr(value, "__dict__", {}).items()]


def _is_of(module: str, packages: Collection[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def _addresses_in_tables(device: Any) -> Iterator[int]:
    """Yield what small tensors of 64-bit integers on the device hold."""
    for one in tracked_tensors():
        is_table = _is_plain(one, device) and one.dtype in (torch.int64, torch.uint64)
        if is_table and one.numel() <= MOST_ENTRIES:
            yield from one.flatten().tolist()


def _is_plain(tensor: Any, device: Any) -> bool:
    """Return whether a tensor is on the device, and no parameter.

    What a compiler traces with looks like such a one, and so do tensors that wrap others.
    """
    return type(tensor) is torch.Tensor and tensor.device == device


def _is_named(group: Group, numbers: Collection[int]) -> bool:
    start = group.tensors[0].untyped_storage().data_ptr()
    return any(start <= number < start + group.num_bytes for number in numbers)
