"""Maps and unmaps are counted by how long they took, and the ledger and the metrics say so."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.backends import FaultyBackend
from prometheus_client.parser import text_string_to_metric_families

from kvcached_core.cli.metrics import exposition
from kvcached_core.errors import OutOfMemoryError
from kvcached_core.ledger.file import ROW_WORDS, Row
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.ledger.times import NO_CALLS, CallTimes, Meter
from kvcached_core.memory.geometry import Geometry
from kvcached_core.memory.orders import PageOrders
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.seats import Seat
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import MIB

PAGE = 2 * MIB
GEOMETRY = Geometry(block_bytes=PAGE // 4, num_planes=2, ids_per_page=4, blocks_per_page=2)
US, MS = 1_000, 1_000_000


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(ledger_directory(tmp_path / "kv") / "host.ledger", 64 * PAGE) as opened:
        yield opened


def metered(*nanoseconds: int, num_failures: int = 0) -> CallTimes:
    meter = Meter()
    for one in nanoseconds:
        meter.count(one)
    for _ in range(num_failures):
        meter.count_failure()
    return meter.times()


def test_a_call_is_in_the_first_bucket_whose_bound_it_does_not_exceed() -> None:
    times = metered(0, 100 * US, 100 * US + 1, 300 * US, MS, 10 * MS, 100 * MS, 100 * MS + 1)
    assert times.buckets == (2, 2, 1, 1, 1, 1)
    assert times.num_calls == 8
    assert times.nanoseconds == 211 * MS + 500 * US + 2 + 0


def test_what_is_taken_is_what_came_since() -> None:
    meter = Meter()
    meter.count(MS)
    first = meter.take()
    meter.count(2 * MS)
    meter.count_failure()
    assert (first.num_calls, first.nanoseconds) == (1, MS)
    assert meter.take() == metered(2 * MS, num_failures=1)
    assert meter.take() == NO_CALLS
    assert meter.times() == metered(MS, 2 * MS, num_failures=1)


def test_threads_that_count_at_once_lose_nothing() -> None:
    meter, num_taken = Meter(), []

    def count() -> None:
        for _ in range(2000):
            meter.count(US)
            num_taken.append(meter.take().num_calls)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(num_taken) + meter.take().num_calls == 8000


def test_words_add_up_and_a_count_that_is_full_begins_again() -> None:
    words = Row.of_copy(bytearray(8 * ROW_WORDS)).unmap_times
    most = CallTimes((2**31 - 1,) * 6, 5, 7)
    NO_CALLS.write(words)
    assert CallTimes.read(words) == NO_CALLS
    most.write(words)
    assert CallTimes.read(words) == most
    CallTimes((1, 2, 3, 4, 5, 6), 1, 1).write(words)
    assert CallTimes.read(words) == CallTimes((0, 1, 2, 3, 4, 5), 6, 8)


def test_two_ranks_of_an_instance_add_up_in_its_row(ledger: Ledger) -> None:
    row = ledger.register(name="llama", engine="test")
    other = Ledger(ledger.path)
    other.join(row)
    for opened, took in ((ledger, 50 * US), (other, 2 * MS)):
        opened.settle(
            row,
            used_bytes=0,
            cached_bytes=0,
            map_times=metered(took),
            unmap_times=metered(3 * took, num_failures=1),
        )
    (view,) = ledger.view().instances
    assert view.map_times == metered(50 * US, 2 * MS)
    assert view.unmap_times == metered(150 * US, 6 * MS, num_failures=2)
    other.close()


def test_what_a_rank_maps_and_cannot_map_is_in_the_metrics(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcached_core.memory.patience.FIRST_PAUSE_SECONDS", 0.0)
    row = ledger.register(name="llama", engine="vLLM 0.32.0")
    ledger.promise(row, 4 * PAGE, PAGE)
    backend = FaultyBackend(HostBackend(), lambda verb, number: (verb, number) == ("map", 2))
    memory = RankMemory(GEOMETRY, 8, Seat(str(ledger.path), row, 1), backend)
    memory.carry_out(PageOrders(map_pages=[1], num_used_pages=2))
    memory.carry_out(PageOrders(map_pages=[2], num_used_pages=3))  # the second try of it
    memory.carry_out(PageOrders(unmap_pages=[1], num_used_pages=2))
    found = {
        (sample.name, sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(exposition(ledger.path.parent))
        for sample in family.samples
        if sample.labels.get("engine_instance") == "llama"
    }
    assert found["kvcached_map_seconds_count", None] == 3
    assert found["kvcached_map_seconds_bucket", "+Inf"] == 3
    assert found["kvcached_map_seconds_sum", None] > 0
    assert found["kvcached_map_failures_total", None] == 1
    assert found["kvcached_unmap_seconds_count", None] == 1
    assert found["kvcached_unmap_failures_total", None] == 0
    bounds = [le for name, le in found if name == "kvcached_map_seconds_bucket"]
    assert bounds == ["0.0001", "0.0003", "0.001", "0.01", "0.1", "+Inf"]
    memory.close()


def test_times_that_could_not_be_written_yet_are_written_later(ledger: Ledger) -> None:
    row = ledger.register(name="llama", engine="test")
    holder = Ledger(ledger.path)
    holder.join(row)
    assert holder._enter()
    for _ in range(2):
        ledger.settle(row, used_bytes=0, cached_bytes=0, map_times=metered(MS))
    holder._exit()
    ledger.settle(row, used_bytes=0, cached_bytes=0)
    assert ledger.view().instances[0].map_times == metered(MS, MS)
    holder.close()


def test_a_backend_that_refuses_is_counted_where_it_is_called() -> None:
    from kvcached_core.memory.arena import Arena

    arena = Arena(FaultyBackend(HostBackend(), lambda verb, _: verb == "create"), GEOMETRY, 8)
    with pytest.raises(OutOfMemoryError):
        arena.map([0])
    assert arena.maps.times() == CallTimes(num_failures=1)
    arena.close()
