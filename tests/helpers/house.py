"""The device of an engine under test, and its neighbour on it, which does what a test says."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from unittest.mock import patch

from helpers.served import ENGINE, NUM_PAGES, PAGE_BYTES, Served, view_of
from helpers.waiting import PATIENCE_SECONDS
from kvcached_core.config import Config, read_config
from kvcached_core.engine import activation, beside, page_book, ranks
from kvcached_core.engine.beside import Turn
from kvcached_core.engine.instance import Instance
from kvcached_core.ledger import entry
from kvcached_core.ledger.bell import wake
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import InstanceView
from kvcached_core.memory.devices import host_device

NEIGHBOUR = "neighbour"
STALL_SECONDS = 0.05


class Neighbour:
    """Another instance, of which nothing runs: it takes and gives as a test says.

    Args:
        config: The settings, with a name of its own.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._rang = Event()
        device = host_device(config)
        self.instance = Instance(
            [device],
            config,
            name=config.name,
            default_name="",
            engine="test",
            on_ring=self._rang.set,
        )
        self.instance.describe(page_bytes=PAGE_BYTES, num_pages=device.total_bytes // PAGE_BYTES)
        self._row = self.instance.seat(device).row
        self._ledger = Ledger(config.dir / "host.ledger")
        self._ledger.join(self._row)

    def take(self, num_pages: int) -> int:
        """Map and use up to so many pages more, of what is free; return how many it was."""
        self._rang.clear()
        self.instance._refusals.forget()  # it asks again whenever the test says so
        granted = self.instance.promise(num_pages, is_urgent=True)
        used = self.view().used_bytes
        self._settle(mapped=granted, used_bytes=used + granted * PAGE_BYTES)
        return granted

    def take_when_rung(self, num_pages: int) -> int:
        """Do so when others say that they gave something."""
        assert self._rang.wait(PATIENCE_SECONDS), "nobody rang"
        return self.take(num_pages)

    def rest(self, num_pages: int) -> None:
        """Leave so many used pages idle."""
        self._settle(used_bytes=self.view().used_bytes - num_pages * PAGE_BYTES)

    def give(self, num_pages: int) -> None:
        """Unmap so many idle pages, as its answer to whoever asked."""
        self.instance.acknowledge(num_pages)
        self._settle(unmapped=num_pages, used_bytes=self.view().used_bytes)

    def give_back(self, num_pages: int | None = None) -> None:
        """Unmap so many used pages, or all that it uses."""
        num_used = self.view().used_bytes // PAGE_BYTES
        num_pages = num_used if num_pages is None else min(num_pages, num_used)
        self.rest(num_pages)
        self.give(num_pages)

    def ask_to_wake(self, num_pages: int) -> Turn:
        """Look whether weights of so many pages may come back, and ask for their room."""
        return self.instance.beside.ask_to_wake(num_pages * PAGE_BYTES)

    def wake_when_rung(self, num_pages: int) -> None:
        """Look so when others gave something, and have the weights."""
        assert self._rang.wait(PATIENCE_SECONDS), "nobody rang"
        assert self.ask_to_wake(num_pages) is Turn.NOW
        self.have_weights(num_pages)

    def have_weights(self, num_pages: int) -> None:
        """Map weights of so many pages more."""
        num_bytes = num_pages * PAGE_BYTES
        self.instance.beside.describe_weights(self.view().weights_bytes + num_bytes)
        self._ledger.settle_weights(self._row, mapped_bytes=num_bytes)
        self.instance.beside.woke(1, 1)
        self.instance.beside.stop_waking()

    def offer_weights(self) -> None:
        """Let others ask for all of its weights."""
        self.instance.beside.offer_weights(self.view().weights_bytes)

    def give_weights(self, num_pages: int) -> None:
        """Drop so many pages of them, as its answer to whoever asked."""
        waiting = self._ledger.settle_weights(self._row, unmapped_bytes=num_pages * PAGE_BYTES)
        self.instance.acknowledge(0)
        wake(self._ledger, waiting)

    def view(self) -> InstanceView:
        """Return what the ledger says of it."""
        return view_of(str(self._config.name), self._config)

    def close(self) -> None:
        """Leave the ledger."""
        self.instance.close()
        self._ledger.close()

    def _settle(self, *, mapped: int = 0, unmapped: int = 0, used_bytes: int) -> None:
        waiting = self._ledger.settle(
            self._row,
            mapped_bytes=mapped * PAGE_BYTES,
            unmapped_bytes=unmapped * PAGE_BYTES,
            used_bytes=used_bytes,
            cached_bytes=0,
        )
        wake(self._ledger, waiting)


class House:
    """A device, the engine under test on it, and its neighbour.

    Args:
        make: Makes the engine under test.
        directory: The folder of the ledgers.
        num_pages: Pages of the device.
        settings: Settings of each engine under test, without their prefix.
    """

    def __init__(
        self,
        make: Callable[[Config], Served],
        directory: Path,
        num_pages: int = NUM_PAGES,
        **settings: float | str,
    ) -> None:
        self.directory = directory
        self._settings = settings
        self._num_pages = num_pages
        self._make = make
        self._undo = ExitStack()
        # Counts are told, and memory is looked for, at once and not some milliseconds later.
        self._undo.enter_context(patch.object(page_book, "REPORT_SECONDS", 0))
        self._undo.enter_context(patch.object(ranks, "LOOK_SECONDS", 0))
        self._undo.enter_context(patch.object(beside, "LOOK_SECONDS", 0))
        # On a loaded machine who has the lock may be stopped for longer than a scheduler waits.
        self._undo.enter_context(patch.object(entry, "SCHEDULER_SECONDS", PATIENCE_SECONDS))
        self._undo.enter_context(patch.object(activation, "STALL_SECONDS", STALL_SECONDS))
        self._undo.enter_context(patch.object(beside, "NUM_KEPT_ACTIVATIONS", 0))

    def start(self, name: str = ENGINE, **settings: float | str) -> Served:
        """Start an engine under test; settings are ours, without their prefix."""
        served = self._make(self._config(name, self._settings | settings))
        self._undo.callback(served.close)
        return served

    def neighbour(self, name: str = NEIGHBOUR, **settings: float | str) -> Neighbour:
        """Start a neighbour of it."""
        made = Neighbour(self._config(name, settings))
        self._undo.callback(made.close)
        return made

    def close(self) -> None:
        """End both."""
        self._undo.close()

    def _config(self, name: str, settings: dict[str, float | str]) -> Config:
        chosen: dict[str, object] = {
            "dir": self.directory,
            "name": name,
            "host_pool": self._num_pages * PAGE_BYTES,
            "page_bytes": PAGE_BYTES,
            "idle_seconds": 1000,
            "min_spare_pages": 0,
            "max_spare_pages": 0,
            "weights_kept_seconds": 0,
        }
        chosen |= settings
        return read_config({f"KVCACHED_{key.upper()}": str(chosen[key]) for key in chosen})
