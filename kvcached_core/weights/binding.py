"""A model's parameters on memory of ours: each storage moves, and all that use it move along."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kvcached_core.memory.torch_device import release_cached_blocks
from kvcached_core.units import GIB, MIB, format_bytes
from kvcached_core.weights.finder import key_of, parts_of, tensors_over

logger = logging.getLogger("kvcached")

# A tensor that is no parameter is one of the weights if it is as large as this.
LEAST_ATTRIBUTE_BYTES = MIB
# Attributes with such a word in their names are written to while the engine runs.
WRITTEN_WORDS = ("buffer", "cache", "lora", "workspace")
# What torch keeps in the dictionary of a module beside attributes.
_MODULE_WORDS = frozenset(vars(torch.nn.Module()))

Modules = Mapping[str, torch.nn.Module]


@dataclass(eq=False)
class Group:
    """The tensors of a model that share one storage.

    Attributes:
        name: The first of them, by its place in the model.
        num_bytes: The storage's size.
        key: What names the storage while it lives.
        tensors: Those that were found in the model.
    """

    name: str
    num_bytes: int
    key: int
    tensors: list[Any]


@dataclass(frozen=True)
class Bound:
    """A storage of ours.

    Attributes:
        name: What lies in it.
        num_bytes: Its size.
        storage: A weak reference: it has expired when no tensor uses it any more.
    """

    name: str
    num_bytes: int
    storage: StorageWeakRef


Place = Callable[[str, int], Any]


@dataclass
class Binding:
    """What was moved, and what was not because somebody unknown uses it.

    Attributes:
        bound: Storages of ours by name, in the model's order.
        static: The bytes of those that stayed, by name.
    """

    bound: dict[str, Bound] = field(default_factory=dict)
    static: dict[str, int] = field(default_factory=dict)

    @property
    def bound_bytes(self) -> int:
        """Bytes of the storages that moved."""
        return sum(bound.num_bytes for bound in self.bound.values())

    @property
    def static_bytes(self) -> int:
        """Bytes of the storages that stayed."""
        return sum(self.static.values())

    def moved(self, modules: Modules) -> list[Group]:
        """Return what the model's tensors use that is neither ours nor known to have stayed.

        An engine that loads weights again may put new parameters in the place of those that were
        bound.

        Args:
            modules: Those that were bound.
        """
        ours = {bound.storage.cdata for bound in self.bound.values()}
        groups = collect(modules)
        return [one for one in groups if one.key not in ours and one.name not in self.static]

    def bind_again(self, modules: Modules, place: Place) -> "Binding":
        """Bind what an engine replaced, each to the place that it had; return what was done.

        What has no such place, or whose place is still in use, stays where it is.

        Args:
            modules: Those that were bound.
            place: As for `bind`; it is asked for names that were bound before only.
        """
        fitting, done = [], Binding()
        for group in self.moved(modules):
            before = self.bound.get(group.name)
            if (
                before is not None
                and before.num_bytes == group.num_bytes
                and before.storage.expired()
            ):
                fitting.append(group)
            else:
                done.leave(group)
        again = bind(fitting, place)
        done.bound |= again.bound
        done.static |= again.static
        self.bound |= done.bound
        self.static |= done.static
        for name in done.static:
            self.bound.pop(name, None)
        return done

    def leave(self, group: Group) -> None:
        """Record that a storage stays where the engine allocated it, and say so."""
        self.static[group.name] = group.num_bytes
        logger.warning(
            "kvcached: %s (%s) stays where the engine put it: something beside the model's tensors "
            "uses it",
            group.name,
            format_bytes(group.num_bytes),
        )


def collect(modules: Modules, left_out: Collection[int] = ()) -> list[Group]:
    """Return the storages of a model's weights, in the order in which its modules stand.

    Weights are its parameters, and floating-point tensors of at least `LEAST_ATTRIBUTE_BYTES` that
    a module, or an object or a container in it, keeps beside them. Buffers are not, nor what is
    named like one: engines write to them. What is empty, or on another device than the first
    parameter, is left out.

    Args:
        modules: The model, then what belongs to it, a drafter for example, each with its name.
        left_out: Modules in them whose own tensors are left out, by their `id`.
    """
    groups: dict[int, Group] = {}
    buffers = {key_of(one) for module in modules.values() for one in module.buffers()}
    device = next((one.device for module in modules.values() for one in module.parameters()), None)
    for name, tensor in _weights(modules, left_out):
        for part_name, part in parts_of(name, tensor):
            key = key_of(part)
            if key is None or key in buffers or part.device != device or part.is_meta:
                continue
            if key not in groups:
                num_bytes = part.untyped_storage().nbytes()
                if not num_bytes:
                    continue
                groups[key] = Group(part_name, num_bytes, key, [])
            groups[key].tensors.append(part)
    return list(groups.values())


def bind(groups: Sequence[Group], place: Place) -> Binding:
    """Move storages, with all tensors that use them, to memory that `place` gives.

    A storage that is still alive afterwards is used by something that is no Python object; its
    tensors go back to it. The old memory is given back after each GiB, so a GPU holds little twice.

    Args:
        groups: What `collect` found.
        place: Returns an int8 tensor of exactly so many bytes, and of a storage of its own, for a
            group's name and size. It is called once for each group, in their order.

    Raises:
        KVCachedError: If `place` does. What was moved before stays moved.
    """
    binding, moved_bytes = Binding(), 0
    if not groups:
        return binding
    users = tensors_over([group.key for group in groups])
    for group in groups:
        group.tensors.clear()
        bound = _move(group, users.pop(group.key), place)
        if bound is None:
            binding.leave(group)
            continue
        binding.bound[group.name] = bound
        moved_bytes += group.num_bytes
        if moved_bytes >= GIB:
            release_cached_blocks()
            moved_bytes = 0
    release_cached_blocks()
    return binding


def _move(group: Group, tensors: list[Any], place: Place) -> Bound | None:
    old = tensors[0].untyped_storage()
    watch = StorageWeakRef(old)
    own = place(group.name, group.num_bytes).untyped_storage()
    own.copy_(old)
    del old
    _point(tensors, own)
    if _is_in_use(watch):
        _point(tensors, torch.UntypedStorage._new_with_weak_ptr(watch.cdata))  # noqa: SLF001
        return None
    return Bound(group.name, group.num_bytes, StorageWeakRef(own))


def _is_in_use(watch: StorageWeakRef) -> bool:
    return not watch.expired()


def _point(tensors: Sequence[Any], storage: Any) -> None:
    """Let tensors lie in `storage` as they lay in theirs."""
    # Inference tensors can be changed only so; the others' hooks must not see it.
    with torch.inference_mode(), torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
        for one in tensors:
            one.set_(storage, one.storage_offset(), one.size(), one.stride())


def _weights(modules: Modules, left_out: Collection[int]) -> Iterator[tuple[str, Any]]:
    """Yield each parameter, and what modules keep beside them, with a name."""
    for root, top in modules.items():
        for path, module in top.named_modules():
            if id(module) in left_out:
                continue
            prefix = f"{root}.{path}" if path else root
            for name, parameter in module._parameters.items():  # noqa: SLF001  its own, in order
                if parameter is not None:
                    yield f"{prefix}.{name}", parameter
            for name, value in vars(module).items():
                if name not in _MODULE_WORDS:
                    for inner, tensor in _inside(value):
                        if _is_weight(name + inner, tensor):
                            yield f"{prefix}.{name}{inner}", tensor


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield an attribute that is a tensor, or the tensors of one that holds some."""
    if isinstance(value, torch.Tensor):
        yield "", value
    elif not isinstance(value, torch.nn.Module | type):
        if isinstance(value, Mapping):
            parts = list(value.items())
        elif isinstance(value, list | tuple):
            parts = list(enumerate(value))
        else:
            parts = list(getattr(value, "__dict__", {}).items())
        yield from (
            (f".{name}", part) for name, part in parts if issubclass(type(part), torch.Tensor)
        )


def _is_weight(name: str, tensor: Any) -> bool:
    num_bytes: int = tensor.numel() * tensor.element_size()
    return (
        tensor.is_floating_point()
        and num_bytes >= LEAST_ATTRIBUTE_BYTES
        and not any(word in name.lower() for word in WRITTEN_WORDS)
    )
