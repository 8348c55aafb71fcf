"""In which order a forward needs the pages of an image: what is outside of the layers, then these.

The image has them in that order, so a layer needs its own pages and all in front of them.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from kvcached_core.weights.binding import Group, Modules, collect
from kvcached_core.weights.image import Image


@dataclass(frozen=True)
class Points:
    """What a forward waits for, and where.

    Attributes:
        num_first_pages: Pages that have to be there before it begins.
        num_pages: For each point that it passes, in turn, the pages that what follows needs.
    """

    num_first_pages: int
    num_pages: tuple[int, ...]


@dataclass(frozen=True)
class Stages:
    """The pages that each part of a model needs, counted from the first page of the image.

    Attributes:
        num_pages: Pages of the image.
        num_outside_pages: For what is in no layer: embeddings, the last norm, a head.
        ends: For each layer, in their order; 0 for one that has nothing in the image.
    """

    num_pages: int
    num_outside_pages: int
    ends: tuple[int, ...]

    def in_front_of_layers(self) -> Points:
        """Return the points of a forward that can wait in front of each layer."""
        return Points(self.num_outside_pages, self._needed[1:])

    def inside_layers(self, layers: Sequence[int]) -> Points:
        """Return the points of a forward that can wait only somewhere in some layers.

        What follows such a point is the rest of the layer, and what comes up to the next point.

        Args:
            layers: In which layers it can, in their order; there is at least one.
        """
        needed = self._needed
        behind = [needed[layer + 1] for layer in layers[1:]]
        return Points(needed[layers[0] + 1], (*behind, self.num_pages))

    @property
    def _needed(self) -> tuple[int, ...]:
        """Pages that are needed up to the end of each layer; first those before all layers."""
        return tuple(accumulate(self.ends, max, initial=self.num_outside_pages))


def find_layers(modules: Modules) -> list[torch.nn.Module]:
    """Return the layers of a model: the list of modules with most bytes, of those that have any.

    Args:
        modules: The model, then what belongs to it, each with its name.
    """
    model = next(iter(modules.values()), None)
    found: list[torch.nn.Module] = []
    most_bytes = 0
    for module in () if model is None else model.modules():
        if isinstance(module, torch.nn.ModuleList):
            num_bytes = sum(one.numel() * one.element_size() for one in module.parameters())
            if num_bytes > most_bytes:  # of a list and one that it is all of, the outer one
                found, most_bytes = list(module), num_bytes
    return found


def find_outside(modules: Modules) -> list[torch.nn.Module]:
    """Return all modules that are no layer, and in none; one of them runs before the first layer.

    Args:
        modules: The model, then what belongs to it, each with its name.
    """
    inside = _inside(modules)
    parts = (part for module in modules.values() for part in module.modules())
    return [part for part in parts if id(part) not in inside]


def in_image_order(modules: Modules) -> list[Group]:
    """Return the storages of a model's weights, first those that something outside of layers uses.

    Whoever lays them out for an image, or looks for them in one, has them in this order.

    Args:
        modules: The model, then what belongs to it, each with its name.
    """
    outside = {group.key for group in _outside(modules)}
    return sorted(collect(modules), key=lambda group: group.key not in outside)


def find_stages(modules: Modules, image: Image) -> Stages:
    """Return what each part of a model needs, now that its weights lie in an image.

    Args:
        modules: Those whose weights do.
        image: Where they lie.
    """
    return Stages(
        image.num_pages,
        _end(_outside(modules), image),
        tuple(_end(collect({"layer": layer}), image) for layer in find_layers(modules)),
    )


def _outside(modules: Modules) -> list[Group]:
    return collect(modules, left_out=_inside(modules))


def _inside(modules: Modules) -> set[int]:
    return {id(part) for layer in find_layers(modules) for part in layer.modules()}


def _end(groups: Collection[Group], image: Image) -> int:
    """Return how many pages there are up to the end of some storages."""
    return max((-(-end // image.page_bytes) for end in _ends(groups, image)), default=0)


def _ends(groups: Collection[Group], image: Image) -> Iterator[int]:
    for group in groups:
        begin = group.tensors[0].untyped_storage().data_ptr() - image.arena.address
        if 0 <= begin < image.layout.num_bytes:  # some may have stayed where they were
            yield begin + group.num_bytes
