"""Modules that keep the addresses of weights as numbers: such weights must stay where they are."""

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import torch

from kvcached_core.weights.binding import Group, Modules

# A table of addresses has one for each weight of a model, or for each expert; it is not larger.
MOST_ENTRIES = 1 << 16


def who_keeps_addresses(modules: Modules, groups: list[Group]) -> str | None:
    """Return the name of a number, or of an int64 tensor, that is the address of a weight.

    What C++ keeps is not seen; adapters know such features of their engines by their settings.

    Args:
        modules: The model, as for `collect`.
        groups: Its storages.
    """
    starts = sorted(
        (group.tensors[0].untyped_storage().data_ptr(), group.num_bytes) for group in groups
    )
    for name, number in _numbers(modules):
        index = bisect_right(starts, (number, 1 << 63)) - 1
        if index >= 0 and number < sum(starts[index]):
            return name
    return None


def _numbers(modules: Modules) -> Iterator[tuple[str, int]]:
    for root, top in modules.items():
        for path, module in top.named_modules():
            kept = {**module._parameters, **module._buffers, **vars(module)}  # noqa: SLF001  own
            for name, value in kept.items():
                for number in _numbers_of(value):
                    yield f"{root}.{path}.{name}" if path else f"{root}.{name}", number


def _numbers_of(value: Any) -> list[int]:
    if type(value) is int:
        return [value]
    if isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.uint64):
        return value.flatten().tolist() if 0 < value.numel() <= MOST_ENTRIES else []
    return []
