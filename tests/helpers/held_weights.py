"""Weights of one rank on the host, held as a worker holds them, with a copy of their own."""

import torch

from helpers.backends import LimitedBackend
from helpers.served import PAGE_BYTES
from helpers.waiting import await_that
from kvcached_core.config import Config
from kvcached_core.memory.seats import Seat
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import GIB
from kvcached_core.weights.host_budget import HostBudget
from kvcached_core.weights.image import Image
from kvcached_core.weights.key import CopyKey
from kvcached_core.weights.layout import lay_out
from kvcached_core.weights.open_copy import open_copy
from kvcached_core.weights.rank import RankWeights
from kvcached_core.weights.status import WeightStatus


class HeldWeights:
    """Random words in an image; see `helpers.served.Weights`.

    Attributes:
        rank: What holds them.

    Args:
        num_pages: How many pages they fill.
        seat: Where they are reported.
        config: The settings; they name the folder of the copy.
    """

    def __init__(self, num_pages: int, seat: Seat, config: Config) -> None:
        self._backend = LimitedBackend(HostBackend(), num_pages * PAGE_BYTES)
        layout = lay_out([("weights", num_pages * PAGE_BYTES)], self._backend.granularity_bytes)
        assert (layout.page_bytes, layout.num_pages) == (PAGE_BYTES, num_pages)
        self._image = Image(self._backend, layout)
        self._image.map_next(num_pages)
        words = self._image.pages_tensor(0, num_pages).view(torch.int64)
        words.random_()
        self._content = words.clone()
        budget, key = HostBudget(config, GIB), CopyKey("0" * 32, str(config.name))
        self.rank = RankWeights(
            self._image, lambda stop: open_copy(config, key, layout, budget, stop=stop)
        )
        self.rank.join(seat)
        self.rank.begin_copy()
        await_that(lambda: self.status.is_copied)

    @property
    def num_available(self) -> int:
        """Pages that the device has for them."""
        return self._backend.limit_bytes // PAGE_BYTES

    @num_available.setter
    def num_available(self, num_pages: int) -> None:
        self._backend.limit_bytes = num_pages * PAGE_BYTES

    @property
    def num_pages(self) -> int:
        """Pages of all of them."""
        return self._image.num_pages

    @property
    def num_resident(self) -> int:
        """Pages that are there."""
        return self._image.num_resident_pages

    @property
    def status(self) -> WeightStatus:
        """What a worker says."""
        return self.rank.status()

    def hold(self, num_pages: int) -> WeightStatus:
        """See `RankWeights.hold`."""
        return self.rank.hold(num_pages)

    def check(self) -> None:
        """Do what a step does: read all of it."""
        assert self.num_resident == self.num_pages, "a step runs on weights that are not there"
        words = self._image.pages_tensor(0, self.num_pages).view(torch.int64)
        assert torch.equal(words, self._content)

    def close(self) -> None:
        """Give everything back."""
        self.rank.close()
