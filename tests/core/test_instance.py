"""An instance on several devices: one promise for all of them, or none."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.seats import view_of
from helpers.waiting import await_that

from kvcached_core.config import CUDA, HOST, read_config
from kvcached_core.engine.instance import Instance
from kvcached_core.engine.ranks import Ranks
from kvcached_core.errors import ConfigError, LedgerError, PolicyError
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.memory.devices import Device, cuda_device
from kvcached_core.units import MIB

PAGE = 16 * MIB
HOUSE = Device(HOST, "host", 8 * PAGE)


def device(name: str, num_pages: int) -> Device:
    return Device(HOST, name, num_pages * PAGE)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Instance]]:
    opened: list[Instance] = []

    def make(
        devices: list[Device],
        *,
        name: str | None = None,
        page_bytes: int = PAGE,
        data_rank: int = 0,
        **settings: str,
    ) -> Instance:
        config = read_config({"KVCACHED_DIR": str(tmp_path / "kv"), **settings})
        instance = Instance(
            devices,
            config,
            name=name,
            default_name="model",
            engine="test",
            data_rank=data_rank,
            on_ring=rung.set,
        )
        instance.describe(page_bytes=page_bytes, num_pages=4)
        opened.append(instance)
        return instance

    rung = threading.Event()
    make.rung = rung  # type: ignore[attr-defined]
    yield make
    for instance in opened:
        instance.close()


def test_a_promise_is_the_same_on_all_devices(start: Callable[..., Instance]) -> None:
    roomy, tight = device("b", 8), device("a", 3)
    instance = start([roomy, tight])
    assert instance.promise(5, is_urgent=False) == 3
    assert (
        view_of(instance, roomy).promised_bytes
        == view_of(instance, tight).promised_bytes
        == 3 * PAGE
    )
    instance.cancel(3)
    assert view_of(instance, roomy).promised_bytes == view_of(instance, tight).promised_bytes == 0


def test_a_page_counts_for_all_ranks_on_a_device(start: Callable[..., Instance]) -> None:
    both, single = device("a", 8), device("b", 8)
    instance = start([both, both, single])
    assert (
        view_of(instance, both).page_bytes == 2 * view_of(instance, single).page_bytes == 2 * PAGE
    )


def test_a_token_takes_what_it_does_on_each_rank_of_a_device(
    start: Callable[..., Instance],
) -> None:
    both, single = device("a", 8), device("b", 8)
    instance = start([both, both, single])
    instance.describe(page_bytes=PAGE, num_pages=4, token_bytes=768)
    assert (
        view_of(instance, both).token_bytes == 2 * view_of(instance, single).token_bytes == 2 * 768
    )


def test_a_refusal_on_the_last_device_leaves_nothing_on_the_first(
    start: Callable[..., Instance],
) -> None:
    first, last = device("a", 8), device("b", 4)
    start([last], name="neighbour").promise(4, is_urgent=False)
    instance = start([first, last])
    assert instance.promise(2, is_urgent=False) == 0
    assert view_of(instance, first).promised_bytes == 0


def test_spare_pages_are_left_to_a_neighbour_that_waits_on_any_device(
    start: Callable[..., Instance],
) -> None:
    first, last = device("a", 8), device("b", 8)
    neighbour = start([last], name="neighbour")
    instance = start([first, last])
    assert instance.promise(6, is_urgent=False) == 6
    assert neighbour.promise(4, is_urgent=True) == 2
    instance.cancel(3)
    assert instance.promise(0, is_urgent=False, num_spare=4) == 1
    assert instance.promise(1, is_urgent=False, num_spare=4) == 1
    assert (
        view_of(instance, first).promised_bytes
        == view_of(instance, last).promised_bytes
        == 5 * PAGE
    )


def test_ranks_that_share_a_device_are_promised_a_page_each(start: Callable[..., Instance]) -> None:
    instance = start([HOUSE, HOUSE])
    assert instance.promise(10, is_urgent=False) == 4
    assert view_of(instance, HOUSE).promised_bytes == 8 * PAGE
    assert instance.seat(HOUSE).num_ranks == 2
    assert view_of(instance, HOUSE).promised_bytes == HOUSE.total_bytes


@pytest.mark.parametrize("is_second_quick", [False, True])
def test_nothing_is_on_its_way_any_more_when_all_ranks_have_unmapped(
    start: Callable[..., Instance], *, is_second_quick: bool
) -> None:
    instance = start([HOUSE, HOUSE])
    assert instance.promise(3, is_urgent=False) == 3
    told: list[list[int]] = []

    def tell(values: list[int]) -> list[int]:
        told.append(values)
        return values

    def hear(_values: list[int]) -> list[int]:
        if not told:
            first.acknowledge(2)  # the first rank gets there while the second one waits
        return told.pop()

    seat = instance.seat(HOUSE)
    first = Ranks(instance, seat, 0, tell)
    second = Ranks(None, seat, 0, hear)
    with Ledger(Path(seat.ledger_path)) as ledger:
        for _rank in (first, second):
            ledger.settle(seat.row, mapped_bytes=3 * PAGE, used_bytes=0, cached_bytes=6 * PAGE)
        if not is_second_quick:
            first.acknowledge(2)
        second.acknowledge(2)
        ledger.settle(
            seat.row, unmapped_bytes=2 * PAGE, used_bytes=0, cached_bytes=0
        )  # the second rank's
        assert view_of(instance, HOUSE).coming_bytes == 2 * PAGE
        ledger.settle(seat.row, unmapped_bytes=2 * PAGE, used_bytes=0, cached_bytes=0)
    assert view_of(instance, HOUSE).coming_bytes == 0


def test_two_instances_that_want_all_devices_never_hold_half_of_it(
    start: Callable[..., Instance],
) -> None:
    one, other = device("a", 4), device("b", 4)
    instances = [start([one, other], name="x"), start([other, one], name="y")]
    granted = [0, 0]

    def work(index: int) -> None:
        for _ in range(300):
            granted[index] = instances[index].promise(4, is_urgent=False)
            instances[index].cancel(granted[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()

    def held_bytes() -> int:
        rows = [view_of(each, place) for each in instances for place in (one, other)]
        return sum(row.promised_bytes for row in rows)

    await_that(lambda: held_bytes() == 0)  # who did not have a lock in time writes later


def test_an_urgent_wish_asks_the_neighbours_and_rings_their_bell(
    start: Callable[..., Instance],
) -> None:
    holder = start([HOUSE], name="holder")
    holder.promise(8, is_urgent=False)
    seat = holder.seat(HOUSE)
    with Ledger(Path(seat.ledger_path)) as ledger:
        ledger.settle(seat.row, mapped_bytes=8 * PAGE, used_bytes=6 * PAGE, cached_bytes=PAGE)
    asker = start([HOUSE], name="asker")
    assert asker.promise(3, is_urgent=True) == 0
    assert start.rung.wait(60)  # type: ignore[attr-defined]
    assert holder.wanted_pages()[0] == 2
    holder.acknowledge(2)
    assert (holder.wanted_pages()[0], view_of(holder, HOUSE).coming_bytes) == (0, 2 * PAGE)


def test_what_is_coming_is_over_when_it_was_unmapped(start: Callable[..., Instance]) -> None:
    holder = start([HOUSE])
    holder.promise(2, is_urgent=False)
    seat = holder.seat(HOUSE)
    with Ledger(Path(seat.ledger_path)) as ledger:
        ledger.settle(seat.row, mapped_bytes=2 * PAGE, used_bytes=0, cached_bytes=0)
        holder.acknowledge(2)
        ledger.settle(seat.row, unmapped_bytes=PAGE, used_bytes=0, cached_bytes=0)
        assert view_of(holder, HOUSE).coming_bytes == PAGE
        ledger.settle(seat.row, unneeded_bytes=PAGE, used_bytes=0, cached_bytes=0)
    assert view_of(holder, HOUSE).coming_bytes == 0


def test_an_alarm_rings_once(start: Callable[..., Instance]) -> None:
    start([HOUSE]).set_alarm(0.01)
    assert start.rung.wait(60)  # type: ignore[attr-defined]


def test_a_taken_default_name_gets_a_number_and_a_given_one_is_refused(
    start: Callable[..., Instance],
) -> None:
    for name in ("model", "model-2"):
        instance = start([HOUSE])
        assert view_of(instance, HOUSE).name == instance.name == name
    start([HOUSE], name="mine")
    with pytest.raises(LedgerError, match="'mine'"):
        start([HOUSE], name="mine")


def test_ranks_of_one_server_have_names_of_their_own(start: Callable[..., Instance]) -> None:
    names = [start([HOUSE], data_rank=rank, KVCACHED_NAME="mine").name for rank in range(3)]
    assert names == ["mine", "mine-dp1", "mine-dp2"]
    names = [start([HOUSE], data_rank=rank).name for rank in (0, 1, 0, 1)]
    assert names == ["model", "model-dp1", "model-2", "model-dp1-2"]
    with pytest.raises(LedgerError, match="'mine-dp1'"):
        start([HOUSE], data_rank=1, KVCACHED_NAME="mine")


def test_a_limit_above_the_device_is_refused_and_leaves_no_row(
    start: Callable[..., Instance], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="LIMIT=1 GiB is above"):
        start([HOUSE], KVCACHED_LIMIT="1GiB")
    with Ledger(tmp_path / "kv" / "host.ledger") as ledger:
        assert ledger.view().instances == ()


def test_a_gpu_is_named_by_its_uuid_and_keeps_its_headroom() -> None:
    gpu = cuda_device("73e906f0-07b3", 100 * PAGE)
    assert (gpu.kind, gpu.name) == (CUDA, "GPU-73e906f0-07b3")
    assert cuda_device(gpu.name, 1).name == gpu.name
    assert gpu.capacity_bytes(read_config({})) == 98 * PAGE
    assert gpu.capacity_bytes(read_config({"KVCACHED_HEADROOM": "16MiB"})) == 99 * PAGE


@pytest.mark.parametrize("headroom", ["100%", "1600MiB", "2TiB"])
def test_a_headroom_that_leaves_nothing_is_refused(headroom: str) -> None:
    gpu = cuda_device("73e906f0-07b3", 100 * PAGE)
    with pytest.raises(ConfigError, match=r"HEADROOM=.* is not allowed; GPU-73e906f0-07b3 has "):
        gpu.capacity_bytes(read_config({"KVCACHED_HEADROOM": headroom}))


def test_the_room_is_that_of_the_device_with_least(start: Callable[..., Instance]) -> None:
    first, last = device("a", 8), device("b", 4)
    start([last], name="neighbour").promise(1, is_urgent=False)
    assert start([first, last]).room_pages() == 3


def test_spare_pages_are_promised_if_they_are_free_and_asked_of_nobody(
    start: Callable[..., Instance],
) -> None:
    holder = start([HOUSE], name="holder")
    holder.promise(5, is_urgent=False)
    instance = start([HOUSE], name="asker")
    assert instance.promise(2, is_urgent=True, num_spare=9) == 3
    assert view_of(instance, HOUSE).waiting_bytes == 0


def test_a_smaller_wish_than_the_refused_one_is_granted_at_once(
    start: Callable[..., Instance],
) -> None:
    start([HOUSE], name="holder").promise(7, is_urgent=False)
    asker = start([HOUSE], name="asker")
    assert asker.promise(4, is_urgent=True) == 1
    asker.cancel(1)
    assert asker.promise(4, is_urgent=True) == 0  # it was refused just now
    assert asker.promise(1, is_urgent=True) == 1


def test_who_was_refused_just_now_has_neither_as_much_nor_a_spare_page_until_it_is_rung(
    start: Callable[..., Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    start([HOUSE], name="holder").promise(8, is_urgent=False)
    asker = start([HOUSE], name="asker")
    assert asker.promise(2, is_urgent=True) == 0
    promised: list[tuple[int, int]] = []
    monkeypatch.setattr(asker, "_promise_on_all", lambda *num, **_how: promised.append(num) or 0)
    assert asker.promise(2, is_urgent=False) == 0
    assert asker.promise(0, is_urgent=False, num_spare=2) == 0
    assert promised == []  # the ledger was not asked
    asker._on_ring()
    asker.promise(2, is_urgent=False)
    asker.promise(0, is_urgent=False, num_spare=2)
    assert promised == [(2, 0), (0, 2)]


def hold(instance: Instance, num_pages: int) -> None:
    assert instance.promise(num_pages, is_urgent=False) == num_pages
    seat = instance.seat(HOUSE)
    with Ledger(Path(seat.ledger_path)) as ledger:
        size = num_pages * instance.page_bytes
        ledger.settle(seat.row, mapped_bytes=size, used_bytes=0, cached_bytes=size)


def test_an_ask_between_looking_and_answering_stays(start: Callable[..., Instance]) -> None:
    holder, asker = start([HOUSE], name="holder"), start([HOUSE], name="asker")
    hold(holder, 8)
    asker.promise(1, is_urgent=True)
    assert holder.wanted_pages()[0] == 1
    asker.clear_waiting()
    asker.promise(2, is_urgent=True)
    holder.acknowledge(1)
    assert holder.wanted_pages()[0] == 1


def test_a_limit_that_is_not_whole_pages_is_met(start: Callable[..., Instance]) -> None:
    instance = start([HOUSE])
    hold(instance, 3)
    seat = instance.seat(HOUSE)
    with Ledger(Path(seat.ledger_path)) as ledger:
        ledger.change_policy(seat.row, limit_bytes=2 * PAGE + PAGE // 2)
    assert instance.wanted_pages() == (1, 1)


def test_a_name_that_is_taken_on_the_last_device_leaves_no_row_on_the_first(
    start: Callable[..., Instance], tmp_path: Path
) -> None:
    first, last = device("a", 8), device("b", 8)
    start([last], name="model")
    assert view_of(start([first, last]), first).name == "model-2"
    with pytest.raises(LedgerError, match="'model'"):
        start([first, last], name="model")
    with Ledger(tmp_path / "kv" / "a.ledger") as ledger:
        assert [seen.name for seen in ledger.view().instances] == ["model-2"]


def test_news_of_a_row_that_is_gone_is_an_error_and_not_silence(
    start: Callable[..., Instance],
) -> None:
    start([HOUSE], name="stays")
    instance = start([HOUSE], name="goes")
    seat = instance.seat(HOUSE)
    instance.has_news()
    assert not instance.has_news()
    with Ledger(Path(seat.ledger_path)) as ledger:
        ledger.unregister(seat.row)
    for _ in range(2):
        assert instance.has_news()
        with pytest.raises(LedgerError, match="has left"):
            instance.wanted_pages()


def test_a_length_that_floors_leave_no_room_for_is_refused_at_the_start(
    start: Callable[..., Instance],
) -> None:
    start([HOUSE], name="owner", KVCACHED_HOST_POOL="128MiB", KVCACHED_FLOOR="96MiB")
    other = start([HOUSE], name="other", KVCACHED_HOST_POOL="128MiB")
    other.describe(page_bytes=PAGE, num_pages=8, least_pages=2)
    with pytest.raises(PolicyError, match=r"'other' needs 48 MiB, but floors of 96 MiB \(owner\)"):
        other.describe(page_bytes=PAGE, num_pages=8, least_pages=3)


def test_requests_borrow_of_a_floor_but_a_first_page_which_never_goes_back_does_not(
    start: Callable[..., Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcached_core.engine.instance.PATIENCE_SECONDS", 0.0)
    start([HOUSE], name="owner", KVCACHED_FLOOR="100%", KVCACHED_HOST_POOL="128MiB")
    other = start([HOUSE], name="other", KVCACHED_HOST_POOL="128MiB")
    missing = "16 MiB of 16 MiB are missing on host; it is held by nobody who says so"
    assert other.promise_first_page() == missing
    assert other.promise(1, is_urgent=False) == 0
    assert other.promise(1, is_urgent=True) == 1


def test_a_wait_for_memory_is_said_with_who_holds_it(
    start: Callable[..., Instance],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("kvcached_core.engine.waiting.LOG_SECONDS", 0.0)
    monkeypatch.setattr("kvcached_core.engine.waiting.REFUSAL_SECONDS", 0.0)
    holder, asker = (start([HOUSE], name=name) for name in ("holder", "asker"))
    assert holder.promise(8, is_urgent=True) == 8
    for _ in range(2):
        assert asker.promise(2, is_urgent=True) == 0
    (text,) = [record.getMessage() for record in caplog.records]
    assert "32 MiB are missing on host; it is held by holder (128 MiB), this one (0 B)" in text
    holder.cancel(8)
    assert asker.promise(2, is_urgent=True) == 2
    asker.cancel(2)
    holder.promise(8, is_urgent=True)
    asker.promise(2, is_urgent=True)
    assert len(caplog.records) == 1  # another wait, not yet a long one


def test_what_is_asked_for_beyond_a_first_part_stays_asked_until_the_last(
    start: Callable[..., Instance],
) -> None:
    holder = start([HOUSE], name="holder")
    holder.promise(8, is_urgent=False)
    seat = holder.seat(HOUSE)
    with Ledger(Path(seat.ledger_path)) as ledger:
        ledger.settle(seat.row, mapped_bytes=8 * PAGE, used_bytes=0, cached_bytes=8 * PAGE)
        start([HOUSE], name="asker").promise(6, is_urgent=True)
        assert holder.wanted_pages()[0] == 6
        holder.acknowledge(4, is_last=False)
        ledger.settle(seat.row, unmapped_bytes=4 * PAGE, used_bytes=0, cached_bytes=4 * PAGE)
        assert holder.wanted_pages()[0] == 2  # a trim that asked for them is not applied yet
        holder.acknowledge(1)
        assert holder.wanted_pages()[0] == 0
