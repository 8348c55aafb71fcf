"""What a model is once it is loaded: its weights piece by piece, and what it keeps beside them.

Two starts of one model have the same of both. So a start that takes its weights from a copy can
tell whether it has what it would have read, and computed, from the files.
"""

import base64
import ctypes
from collections.abc import Collection, Iterator, Mapping
from typing import Any
from zlib import crc32

import torch

from kvcached_core.units import KIB, MIB
from kvcached_core.weights.binding import WRITTEN_WORDS, Group, Modules
from kvcached_core.weights.finder import key_of
from kvcached_core.weights.scratch import walk
from kvcached_core.weights.sums import begin_sums_of

# What is summed up at a time; what is left of a tensor behind such blocks is read on the host.
BLOCK_BYTES = 2 * MIB
# A tensor beside the weights is kept itself where it is not larger: scales, above all.
MOST_KEPT_BYTES = KIB
# Where torch keeps a module's buffers: every one of them has this in its name.
_BUFFERS = "_buffers"


def fingerprint(content: torch.Tensor) -> int:
    """Return a number that other bytes have not; it waits for the device.

    Args:
        content: The bytes, an int8 tensor of one dimension on any device, aligned to words.
    """
    num_blocks = content.numel() // BLOCK_BYTES
    summed, rest = content.split([num_blocks * BLOCK_BYTES, content.numel() % BLOCK_BYTES])
    sums = begin_sums_of(summed, num_blocks)() if num_blocks else []
    return crc32(_bytes_of(rest), crc32(repr(sums).encode()))


def content_of(group: Group) -> torch.Tensor:
    """Return an int8 tensor over the storage of a group."""
    storage = group.tensors[0].untyped_storage()
    bare = torch.empty(0, dtype=torch.int8, device=storage.device)
    return bare.set_(storage, 0, (group.num_bytes,), (1,))


class Beside:
    """What a model keeps beside its weights, as it is now.

    It is numbers, and tensors that are no weights, in modules of the model and in objects of some
    packages. What is named like something that is written to while an engine runs is left out.

    Args:
        modules: The model, then what belongs to it.
        groups: Its weights.
        packages: Names of the engine's modules, each with what is below it.
    """

    def __init__(
        self, modules: Modules, groups: Collection[Group], packages: Collection[str]
    ) -> None:
        keys = {group.key for group in groups}
        self.found: dict[str, Any] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for name, value in _all_of(modules, packages):
            if not isinstance(value, torch.Tensor):
                self.found[name] = repr(value)
            elif key_of(value) not in keys and not _is_written(name) and not value.is_meta:
                self._tensors[name] = value
                self.found[name] = _tensor_words(value)

    def become(self, wanted: Mapping[str, Any]) -> str:
        """Write the small tensors that are kept into their places.

        Returns:
            The name of something that is still not as it is wanted; empty if all is.
        """
        for name, words in wanted.items():
            tensor, found = self._tensors.get(name), self.found.get(name)
            if tensor is None or found is None or found == words or not isinstance(words, list):
                continue
            if found[:2] == words[:2] and words[3]:
                kept = torch.frombuffer(bytearray(base64.b64decode(words[3])), dtype=tensor.dtype)
                with torch.inference_mode():
                    tensor.copy_(kept.view(tensor.shape))
                self.found[name] = _tensor_words(tensor)
        names = {*self.found, *wanted}
        return next((one for one in sorted(names) if self.found.get(one) != wanted.get(one)), "")


def _all_of(modules: Modules, packages: Collection[str]) -> Iterator[tuple[str, Any]]:
    yield from walk(modules, packages, (bool, int, float))
    for root, module in modules.items():
        yield from ((f"{root}.{name}", one) for name, one in module.named_parameters())


def _is_written(name: str) -> bool:
    parts = [part for part in name.lower().split(".") if part != _BUFFERS]
    return any(word in part for part in parts for word in WRITTEN_WORDS)


def _tensor_words(tensor: torch.Tensor) -> list[Any]:
    """Return what a record says of a tensor: type, shape, fingerprint and, of a small one, all."""
    plain = tensor.detach().contiguous().reshape(-1)
    content = plain.view(torch.int8) if plain.numel() else plain.new_empty(0, dtype=torch.int8)
    kept = base64.b64encode(_bytes_of(content)).decode() if _is_small(content) else ""
    return [str(tensor.dtype), list(tensor.shape), fingerprint(content), kept]


def _is_small(content: torch.Tensor) -> bool:
    return bool(0 < content.numel() <= MOST_KEPT_BYTES)


def _bytes_of(content: torch.Tensor) -> bytes:
    there = content.cpu().contiguous()
    return ctypes.string_at(there.data_ptr(), there.numel()) if there.numel() else b""
