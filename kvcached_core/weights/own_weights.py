"""A worker's weights on memory of ours: taken over once they are loaded, and kept up with."""

from collections.abc import Callable
from typing import Any

from kvcached_core.config import Config
from kvcached_core.memory.torch_device import current_stream, find_device, make_backend
from kvcached_core.weights.adopting import Adopted, adopt
from kvcached_core.weights.binding import Modules
from kvcached_core.weights.host_budget import HostBudget
from kvcached_core.weights.key import Origin, copy_key
from kvcached_core.weights.open_copy import open_copy
from kvcached_core.weights.rank import RankWeights


class OwnWeights:
    """The weights of a worker on memory of ours, all of which is resident at first.

    Args:
        adopted: What was taken over.
        rank: The image, its copy on the host, and their part of the ledger.
    """

    def __init__(self, adopted: Adopted, rank: RankWeights) -> None:
        self.adopted = adopted
        self.rank = rank
        self._may_move = True

    @property
    def num_bytes(self) -> int:
        """What their pages take of the device, in bytes."""
        return self.adopted.image.layout.num_bytes

    def follow(self, *, is_update: bool, is_captured: bool = False) -> None:
        """Take over what the engine put in the place of weights, while all pages are there.

        Args:
            is_update: All weights were written, so all are copied again before they are given.
            is_captured: Graphs have the addresses of weights as they are now: what is not in its
                place stays where it is, from now on.
        """
        self._may_move = self._may_move and not is_captured
        if (self._may_move and self.adopted.follow()) or is_update:
            self.rank.mark_dirty()


def take_over(
    modules: Modules, device: Any, config: Config, origin_of: Callable[[str], Origin]
) -> OwnWeights | None:
    """Move a loaded model's weights to memory of ours: before anything is captured or sized.

    Beside the weights, it needs a little more than a GiB of the device while it runs.

    Args:
        modules: The model, then what belongs to it, a drafter for example, each with its name.
        device: Where they lie, as torch names it.
        config: The settings.
        origin_of: Returns what decides the weights' bytes, with the digest of their layout.

    Returns:
        None if nothing can be moved; a line in the log says why.

    Raises:
        BackendError: If there is no memory for a page. Some weights have moved then.
    """
    adopted = adopt(modules, make_backend(device))
    if adopted is None:
        return None
    layout, budget = adopted.image.layout, HostBudget(config)
    key = copy_key(origin_of(layout.digest))
    cpus = find_device(device, config).near_cpus()
    rank = RankWeights(
        adopted.image,
        lambda stop: open_copy(config, key, layout, budget, stop=stop, cpus=cpus),
        current_stream(device),
    )
    return OwnWeights(adopted, rank)
