"""Taking a model's weights over: from where an engine loaded them to an image of ours."""

import logging
from typing import Any

from kvcached_core.memory.vmm.backend import Backend
from kvcached_core.units import format_bytes
from kvcached_core.weights.addresses import who_keeps_addresses
from kvcached_core.weights.binding import Binding, Modules, bind
from kvcached_core.weights.image import Image
from kvcached_core.weights.layout import lay_out
from kvcached_core.weights.stages import in_image_order

logger = logging.getLogger("kvcached")


class Adopted:
    """A model whose weights lie in an image, all of whose pages are resident.

    Args:
        modules: The model, then what belongs to it, each with its name; their order is that of the
            image.
        image: Where the weights lie.
        binding: What of them does.
    """

    def __init__(self, modules: Modules, image: Image, binding: Binding) -> None:
        self.modules = modules
        self.image = image
        self.binding = binding
        self._pieces = {piece.name: piece for piece in image.layout.pieces}

    def follow(self) -> bool:
        """Take over what the engine put in the place of weights of ours since.

        It needs all pages of the image.

        Returns:
            Whether there was something.
        """
        again = self.binding.bind_again(self.modules, self.place)
        return bool(again.bound)

    def place(self, name: str, num_bytes: int) -> Any:
        """Return the memory of a storage; the pages up to its end are mapped."""
        piece = self._pieces[name]
        if piece.num_bytes != num_bytes:
            raise ValueError(f"{name} has {num_bytes} bytes, its place {piece.num_bytes}")
        num_missing = -(-piece.end_bytes // self.image.page_bytes) - self.image.num_resident_pages
        if num_missing > 0:
            self.image.map_next(num_missing)
        return self.image.tensor(piece)


def adopt(modules: Modules, backend: Backend) -> Adopted | None:
    """Move a model's weights to an image of their own.

    Beside the weights, it needs a little more than a GiB of the device while it runs.

    Args:
        modules: The model, then what belongs to it, a drafter for example, each with its name.
        backend: Where the image's memory comes from.

    Returns:
        None if nothing can be moved; a line in the log says why.

    Raises:
        BackendError: If there is no memory for a page. Some weights have moved then.
    """
    groups = in_image_order(modules)
    if not groups:
        logger.warning("kvcached: elastic weights off: this model has none on its device")
        return None
    keeper = who_keeps_addresses(modules, groups)
    if keeper is not None:
        logger.warning("kvcached: elastic weights off: %s is the address of a weight", keeper)
        return None
    sizes = [(group.name, group.num_bytes) for group in groups]
    image = Image(backend, lay_out(sizes, backend.granularity_bytes))
    adopted = Adopted(modules, image, Binding())
    adopted.binding = binding = bind(groups, adopted.place)
    image.map_next(image.num_pages - image.num_resident_pages)
    logger.info(
        "kvcached: %s of weights in %d pages of %s; %s stay where they were",
        format_bytes(binding.bound_bytes),
        image.num_pages,
        format_bytes(image.page_bytes),
        format_bytes(binding.static_bytes),
    )
    return adopted
