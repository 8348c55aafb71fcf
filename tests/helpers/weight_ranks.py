"""A rank with weights on some device, its ledger, and what it did there in turn."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import patch

import torch

from helpers.backends import Layer, Result
from helpers.waiting import await_that
from kvcached_core.config import Config
from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import InstanceView
from kvcached_core.memory.seats import Seat
from kvcached_core.memory.vmm.backend import Backend
from kvcached_core.units import GIB, KIB
from kvcached_core.weights.budgets import make_budget
from kvcached_core.weights.host_copy import HostCopy
from kvcached_core.weights.image import Image
from kvcached_core.weights.key import CopyKey
from kvcached_core.weights.layout import Layout, lay_out
from kvcached_core.weights.open_copy import open_copy
from kvcached_core.weights.rank import RankWeights
from kvcached_core.weights.replicas import Replicas

PAGE = 64 * KIB
NUM_PAGES = 19
KEY = CopyKey("0" * 32, "llama")


def layout(page_bytes: int = PAGE) -> Layout:
    """Return one of 19 pages, which pieces begin and end inside of."""
    sizes = [(f"layer.{index}", 3 * page_bytes + 700) for index in range(6)]
    found = lay_out([*sizes, ("norm", 100)], page_bytes)
    assert (found.page_bytes, found.num_pages) == (page_bytes, NUM_PAGES)
    return found


class Recorder(Layer):
    """Writes down every verb."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.verbs: list[str] = []

    def _call(
        self, verb: str, _num_bytes: int, function: Callable[..., Result], *args: object
    ) -> Result:
        self.verbs.append(verb)
        return function(*args)


class WeightedRank:
    """A rank whose weights are random words, and all there.

    Args:
        backend: The device's memory.
        folder: For the ledger and for host copies.
        num_budget_pages: Pages that fit into the host's memory.
        page_bytes: The size of a page.
        key: Of the weights.
        replicas: What it has from others with these weights, if it does.
        settings: More settings.

    Attributes:
        done: What was done, in turn: the backend's verbs and, as `settle`, reports to the ledger.
        content: What the weights shall be.
    """

    def __init__(
        self,
        backend: Backend,
        folder: Path,
        num_budget_pages: int = 4 * NUM_PAGES,
        page_bytes: int = PAGE,
        key: CopyKey = KEY,
        *,
        replicas: Replicas | None = None,
        **settings: Any,
    ) -> None:
        self._undo, self._key = ExitStack(), key
        room = {"weights_dir": folder / "weights", "host_budget": num_budget_pages * page_bytes}
        self.config = Config(dir=folder, **(room | settings))
        self.ledger = self._undo.enter_context(Ledger(folder / "gpu.ledger", GIB))
        self.row = self.ledger.register(name="ours", engine="test")
        recorder = Recorder(backend)
        self.done = recorder.verbs
        self.image = Image(recorder, layout(page_bytes))
        self.image.map_next(NUM_PAGES)
        most = 1 << 62
        generator = torch.Generator().manual_seed(int(key.digest[0], 16))
        self.words().copy_(torch.randint(-most, most, self.words().shape, generator=generator))
        self.content = self.words().clone()
        self.weights = RankWeights(self.image, self.open_copy, replicas=replicas)
        self._undo.callback(self.weights.close)
        settle = Ledger.settle_weights

        def settle_and_tell(ledger: Ledger, row: RowKey, **changes: int) -> list[RowKey]:
            self.done.append("settle")
            return settle(ledger, row, **changes)

        self._undo.enter_context(patch.object(Ledger, "settle_weights", settle_and_tell))

    def open_copy(self, stop: Event) -> HostCopy | None:
        """Open the host copy, as an engine does."""
        budget = make_budget(self.config, GIB)
        return open_copy(self.config, self._key, self.image.layout, budget, stop=stop)

    def start(self) -> "WeightedRank":
        """Join the ledger, and return when the weights are copied, and the copy is offered."""
        self.weights.join(self.seat)
        self.weights.begin_copy()
        await_that(lambda: self.weights.status().is_copied)
        self.weights.copying.join()
        self.done.clear()
        return self

    @property
    def seat(self) -> Seat:
        """The rank's place in the ledger."""
        return Seat(str(self.ledger.path), self.row, 1)

    @property
    def copy(self) -> HostCopy:
        """Its host copy."""
        assert self.weights.copying.copy is not None
        return self.weights.copying.copy

    def words(self, num_pages: int = NUM_PAGES) -> torch.Tensor:
        """Return the first pages as words; who reads them has waited for them."""
        return self.image.pages_tensor(0, num_pages).view(torch.int64)

    def view(self) -> InstanceView:
        """Return what the ledger says of it."""
        (found,) = (view for view in self.ledger.view().instances if view.name == "ours")
        return found

    def check(self, num_pages: int) -> None:
        """See that so many pages are there, with what they shall hold, and that all know it."""
        assert self.weights.status().num_resident_pages == num_pages
        assert sorted(self.image.arena.resident_pages) == list(range(num_pages))
        page_bytes = self.image.page_bytes
        num_words = num_pages * page_bytes // 8
        assert self.words(num_pages).equal(self.content[:num_words])
        assert self.view().weights_bytes == num_pages * page_bytes

    def change(self, word: int, value: int) -> None:
        """Write into the weights, as an update does."""
        self.words()[word] = value
        self.content[word] = value

    def close(self) -> None:
        """End it."""
        self._undo.close()
