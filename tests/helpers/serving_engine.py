"""Engines that serve without an end, each in a thread, and fill a device."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from helpers.fake_engine import FakeEngine
from helpers.house import House
from helpers.served import PAGE_BYTES
from helpers.waiting import PATIENCE_SECONDS, await_that
from kvcached_core.ledger.survey import survey

NUM_REQUEST_PAGES = 3
TURN_SECONDS, PAUSE_SECONDS = 0.002, 0.01  # between tries, and between two requests


class ServingEngine(threading.Thread):
    """One engine and its only client.

    Attributes:
        num_served: Requests that were answered, each with what was written for it.
        is_paused: Whether it gets no requests; it answers its neighbours all the same.
        error: What ended it.

    Args:
        house: Where it starts.
        name: What it is called.
        settings: Its settings.
    """

    def __init__(self, house: House, name: str, **settings: float | str) -> None:
        super().__init__(name=name)
        self._house, self._settings = house, settings
        self._end = threading.Event()
        self.num_served = 0
        self.is_paused = False
        self.error: BaseException | None = None

    def run(self) -> None:
        """Serve until it is ended."""
        try:
            served = self._house.start(self.name, **self._settings)
            assert isinstance(served, FakeEngine)
            while not self._end.wait(PAUSE_SECONDS):
                if not self.is_paused:
                    self._serve(served)
                while served.num_wakes:
                    served.heed()
        except BaseException as error:  # noqa: BLE001  the test's thread says it
            self.error = error

    def end(self) -> None:
        """Let it finish what it does."""
        self._end.set()
        self.join(PATIENCE_SECONDS)
        if self.error is not None:
            raise self.error

    def serves(self) -> None:
        """Wait until it has answered three more requests."""
        wanted = self.num_served + 3
        await_that(lambda: self.num_served >= wanted or self.error is not None)
        assert self.error is None, self.error

    def _serve(self, served: FakeEngine) -> None:
        served.send("request", NUM_REQUEST_PAGES, is_cached=True)
        while not served.names:
            served.turn()
            if not served.names and self._end.wait(TURN_SECONDS):
                return
        served.end("request")
        served.turn()
        self.num_served += 1


@contextmanager
def serving(house: House, *names: str, **settings: float | str) -> Iterator[list[ServingEngine]]:
    """Run engines that serve."""
    engines = [ServingEngine(house, name, **settings) for name in names]
    try:
        for engine in engines:
            engine.start()
        for engine in engines:
            engine.serves()
        yield engines
    finally:
        for engine in engines:
            engine.end()


def fill(house: House) -> None:
    """Wait until the engines' caches and weights leave nothing free."""

    def is_full() -> bool:
        devices = survey(house.directory).devices
        return any(one.free_bytes < NUM_REQUEST_PAGES * PAGE_BYTES for one in devices)

    await_that(is_full)
