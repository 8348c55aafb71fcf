"""Weights of one rank on the host that a test can tell by their bytes, without a copy."""

from pathlib import Path

import torch

from helpers.served import PAGE_BYTES
from kvcached_core.config import Config
from kvcached_core.ledger.bell import wake
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.seats import Seat
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.weights.status import WeightStatus


class FakeWeights:
    """A run of pages, each full of its own number; all are there at first.

    Attributes:
        num_available: Pages that the device has for them; fewer are a stranger's doing.

    Args:
        num_pages: How many there are.
        seat: Where they are reported.
    """

    page_bytes = PAGE_BYTES

    def __init__(self, num_pages: int, seat: Seat, _config: Config) -> None:
        self.num_pages = self.num_available = num_pages
        page_bytes = self.page_bytes
        self.arena = Arena(HostBackend(), Geometry(page_bytes, 1, 1, 1), num_pages)
        self._whole = self.arena.tensor().view(num_pages, page_bytes)
        self._seat = seat
        self._ledger = Ledger(Path(seat.ledger_path))
        self._ledger.join(seat.row)
        self.hold(num_pages)

    @property
    def num_resident(self) -> int:
        """Pages that are there."""
        return len(self.arena.resident_pages)

    @property
    def status(self) -> WeightStatus:
        """What a worker says."""
        return WeightStatus(self.num_pages, self.num_resident, self.page_bytes, is_copied=True)

    def hold(self, num_pages: int) -> WeightStatus:
        """See `EnginePort.hold_weights`: page by page, each told at once."""
        while self.num_resident > num_pages:
            self.arena.unmap([self.num_resident - 1])
            self._report(unmapped_bytes=self.page_bytes)
        while self.num_resident < num_pages:
            page = self.num_resident
            if page >= self.num_available:
                break
            self.arena.map([page])
            self._whole[page].fill_(page + 1)
            self._report(mapped_bytes=self.page_bytes)
        return self.status

    def check(self) -> None:
        """Do what a step does: read all of it."""
        assert self.num_resident == self.num_pages, "a step runs on weights that are not there"
        marks = torch.arange(1, self.num_pages + 1, dtype=torch.int8)
        assert torch.equal(self._whole[:, 0], marks)
        assert torch.equal(self._whole[:, -1], marks)

    def close(self) -> None:
        """Give everything back."""
        self.arena.close()
        self._ledger.close()

    def _report(self, **changes: int) -> None:
        wake(self._ledger, self._ledger.settle_weights(self._seat.row, **changes))
