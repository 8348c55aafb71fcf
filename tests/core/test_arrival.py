"""Starting beside neighbours: they make room, and nobody takes it meanwhile."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached_core.config import HOST, Config, read_config
from kvcached_core.engine.arrival import Arrival
from kvcached_core.engine.instance import Instance
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.memory.devices import Device
from kvcached_core.units import MIB

PAGE = 16 * MIB
POOL = Device(HOST, "host", 8 * PAGE)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return read_config({"KVCACHED_DIR": str(tmp_path / "kv")})


class Neighbour:
    """An instance with cached pages that gives what it is asked for."""

    def __init__(self, config: Config, num_cached: int) -> None:
        self.instance = Instance(
            [POOL], config, name="neighbour", default_name="", engine="test", on_ring=self.answer
        )
        self.instance.describe(page_bytes=PAGE, num_pages=8)
        self.instance.promise(num_cached, is_urgent=False)
        seat = self.instance.seat(POOL)
        self.row = seat.row
        self.ledger = Ledger(Path(seat.ledger_path))
        size = num_cached * PAGE
        self.ledger.settle(self.row, mapped_bytes=size, used_bytes=0, cached_bytes=size)
        self.gave = threading.Event()

    def answer(self) -> None:
        size = self.ledger.wanted(self.row).asked_bytes
        self.ledger.settle(self.row, unmapped_bytes=size, used_bytes=0, cached_bytes=8 * PAGE)
        self.instance.acknowledge(0)
        self.gave.set()

    def close(self) -> None:
        self.instance.close()
        self.ledger.close()


@pytest.fixture
def neighbour(config: Config) -> Iterator[Neighbour]:
    made = Neighbour(config, 7)
    yield made
    made.close()


def arrive(config: Config, num_pages: int) -> Arrival:
    size = num_pages * PAGE
    return Arrival(POOL, config, name="new", engine="test", static_bytes=size)


def test_a_neighbours_cache_makes_room(config: Config, neighbour: Neighbour) -> None:
    arrival = arrive(config, 5)
    assert arrival.make_room()
    assert neighbour.gave.is_set()
    assert neighbour.ledger.free_bytes(neighbour.row) == 0  # what is free now is spoken for
    arrival.shrink(PAGE)
    assert neighbour.ledger.free_bytes(neighbour.row) == 4 * PAGE
    arrival.close()
    assert neighbour.ledger.free_bytes(neighbour.row) == 5 * PAGE


def test_nobody_is_promised_what_an_arrival_announced(config: Config, neighbour: Neighbour) -> None:
    arrival = arrive(config, 1)
    assert arrival.make_room()
    assert neighbour.instance.promise(1, is_urgent=False) == 0
    arrival.close()
    assert neighbour.instance.promise(1, is_urgent=False) == 1


def test_where_nobody_can_give_the_start_goes_on_with_a_warning(
    config: Config, neighbour: Neighbour, caplog: pytest.LogCaptureFixture
) -> None:
    ledger, row = neighbour.ledger, neighbour.row
    ledger.settle(row, used_bytes=7 * PAGE, cached_bytes=0)
    arrival = arrive(config, 5)
    assert not arrival.make_room(patience_seconds=0.05)
    assert "64 MiB of 80 MiB are missing on host; it is held by neighbour (112 MiB)" in caplog.text
    assert "the start of this engine goes on" in caplog.text
    arrival.close()


def test_two_engines_of_one_process_number_in_two_namespaces_may_start_at_once(
    config: Config,
) -> None:
    first, second = arrive(config, 1), arrive(config, 2)
    assert first.make_room()
    assert second.make_room()
    first.close()
    second.close()
