"""Room for a program beside two engines whose caches and weights fill the device."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from helpers import allocating
from helpers.fake_engine import FakeEngine
from helpers.fake_weights import FakeWeights
from helpers.house import House
from helpers.served import NUM_WEIGHT_PAGES, PAGE_BYTES
from helpers.serving_engine import fill, serving
from helpers.waiting import PATIENCE_SECONDS

from kvcached_core import control
from kvcached_core.config import Config
from kvcached_core.control import Outcome
from kvcached_core.errors import ConfigError, NoRoomError
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.survey import survey
from kvcached_core.ledger.view import DeviceView, InstanceView
from kvcached_core.memory.devices import host_device
from kvcached_core.program.room import Room
from kvcached_core.units import MIB

NUM_PAGES = 40
NEED = 18 * PAGE_BYTES  # what is left serves both engines, though the fake ones scatter blocks
NUM_ROUNDS = 20


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    make = partial(FakeEngine, make_weights=FakeWeights)
    made = House(make, tmp_path / "kv", num_pages=NUM_PAGES, weights="yield")
    yield made
    made.close()


def config_of(house: House) -> Config:
    return Config(dir=house.directory, host_pool=NUM_PAGES * PAGE_BYTES, page_bytes=PAGE_BYTES)


def room_for(house: House, need: int | str = NEED, priority: int = 0) -> Room:
    config = config_of(house)
    return Room([host_device(config)], config, name="train", need=str(need), priority=priority)


def device_of(house: House) -> DeviceView:
    (device,) = survey(house.directory).devices
    return device


def row_of(house: House, name: str = "train") -> InstanceView:
    return next(one for one in device_of(house).instances if one.name == name)


@contextmanager
def program(num_bytes: int) -> Iterator["subprocess.Popen[str]"]:
    """Run a process that allocates so much; it has it when the block begins."""
    words = [sys.executable, allocating.__file__, str(num_bytes)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as started:
        assert started.stdout
        assert started.stdout.readline() == "all\n"
        yield started
        started.communicate("0\n")


def test_it_has_all_of_it_each_time_and_both_engines_serve_before_during_and_after(
    house: House,
) -> None:
    with serving(house, "one", "two") as engines:
        for _ in range(NUM_ROUNDS):
            fill(house)
            with room_for(house) as room:
                assert room.make(PATIENCE_SECONDS)
                room.begin()
                assert row_of(house).static_bytes == NEED
                with program(NEED) as started:
                    room.look([started.pid])
                    row = row_of(house)
                    assert row.resident_bytes >= NEED - 2 * allocating.SLACK_BYTES
                    assert row.resident_bytes + row.static_bytes == max(NEED, row.resident_bytes)
                    for engine in engines:
                        engine.serves()
                    assert sum(one.resident_bytes for one in device_of(house).instances) <= (
                        NUM_PAGES * PAGE_BYTES
                    )
            for engine in engines:
                engine.serves()


def test_idle_engines_give_their_weights_and_have_them_back(house: House) -> None:
    need = (NUM_PAGES - 4) * PAGE_BYTES  # each keeps the page that never goes
    with serving(house, "one", "two") as engines:
        fill(house)
        for engine in engines:
            engine.is_paused = True
        with room_for(house, need) as room:
            assert room.make(PATIENCE_SECONDS)
            room.begin()
            assert [row_of(house, name).weights_bytes for name in ("one", "two")] != [
                NUM_WEIGHT_PAGES * PAGE_BYTES
            ] * 2
            with program(need) as started:
                room.look([started.pid])
                assert row_of(house).resident_bytes >= need - 2 * allocating.SLACK_BYTES
        for engine in engines:
            engine.is_paused = False
        for engine in engines:
            engine.serves()


def test_the_row_follows_what_the_program_allocates_and_frees(house: House) -> None:
    with room_for(house) as room:
        assert room.make(0)
        room.begin()
        room.look([])
        assert (row_of(house).resident_bytes, row_of(house).static_bytes) == (0, NEED)
        with program(NEED // 2) as first:
            room.look([first.pid])
            half = row_of(house)
            assert abs(half.resident_bytes - NEED // 2) <= 2 * allocating.SLACK_BYTES
            assert half.resident_bytes + half.static_bytes == NEED
            with program(NEED) as second:
                room.look([first.pid, second.pid])  # more than it said
                assert row_of(house).resident_bytes > NEED
                assert row_of(house).static_bytes == 0
        room.look([first.pid, second.pid])
        assert (row_of(house).resident_bytes, row_of(house).static_bytes) == (0, NEED)
    assert not (house.directory / "host.ledger").exists()  # nobody is left


def test_nobody_is_promised_what_is_announced_and_what_is_left_serves_others(house: House) -> None:
    neighbour = house.neighbour()
    with room_for(house) as room:
        assert room.make(0)
        assert neighbour.take(NUM_PAGES) == NUM_PAGES - 18
        room.begin()
        with program(NEED) as started:
            room.look([started.pid])
            assert neighbour.take(1) == 0
    assert neighbour.take(NUM_PAGES) == NEED // PAGE_BYTES


def test_without_room_it_is_said_who_holds_what_and_what_could_be_had(house: House) -> None:
    neighbour = house.neighbour()
    neighbour.take(30)
    neighbour.rest(4)
    with room_for(house) as room, pytest.raises(NoRoomError) as caught:
        room.make(0)
    assert str(caught.value) == (
        "there is no room for train: 16 MiB of 36 MiB are missing on host; it is held by "
        "neighbour (60 MiB); 28 MiB could be had now; lower --need, wait for longer with --wait, "
        "or stop who holds it"
    )
    assert neighbour.take(NUM_PAGES) == 10  # nothing stays announced


def test_floors_of_engines_are_kept_and_named(house: House) -> None:
    neighbour = house.neighbour(floor=26 * PAGE_BYTES)
    with room_for(house) as room, pytest.raises(NoRoomError, match="floors kept for neighbour 52"):
        room.make(0)
    with room_for(house, 14 * PAGE_BYTES) as room:
        assert room.make(0)
        assert neighbour.take(NUM_PAGES) == 26


def test_room_comes_when_requests_of_a_neighbour_end(house: House) -> None:
    neighbour = house.neighbour()
    neighbour.take(NUM_PAGES)
    looks, announced = [], []

    def answer() -> bool:  # between two looks of the program
        announced.append(row_of(house).static_bytes)
        looks.append(row_of(house, "neighbour").asked_bytes)
        if len(looks) == 1:
            neighbour.rest(30)
        elif looks[-1]:
            neighbour.give(18)
        return False

    with room_for(house) as room:
        assert room.make(PATIENCE_SECONDS, answer)
    assert looks[-1] == NEED
    assert set(announced) == {NEED}  # the neighbour's next request waits behind it


def test_who_is_told_to_stop_leaves_nothing_announced(house: House) -> None:
    neighbour = house.neighbour()
    neighbour.take(NUM_PAGES)
    with room_for(house) as room:
        assert not room.make(PATIENCE_SECONDS, lambda: True)
    assert [one.name for one in device_of(house).instances] == ["neighbour"]


def test_nobody_asks_a_program_for_what_it_holds(house: House) -> None:
    """Neither by rank, nor below a floor, nor for weights that come back."""
    with serving(house, "one", priority=10) as (engine,):
        with room_for(house, priority=-10) as room, program(NEED) as started:
            assert room.make(PATIENCE_SECONDS)
            room.begin()
            room.look([started.pid])
            fill(house)
            engine.serves()
            row = row_of(house)
            assert (row.asked_bytes, row.num_asked) == (0, 0)
        assert row_of(house, "one").weights_needed_bytes == NUM_WEIGHT_PAGES * PAGE_BYTES


def test_two_programs_of_one_name_are_told_apart(house: House) -> None:
    with room_for(house, 4 * MIB) as first, room_for(house, 4 * MIB) as second:
        assert (first.name, second.name) == ("train", "train-2")
        assert first.make(0)
        assert second.make(0)
        assert device_of(house).free_bytes == NUM_PAGES * PAGE_BYTES - 8 * MIB


@pytest.mark.parametrize(
    ("need", "error", "text"),
    [
        ("20Gi", ConfigError, "--need='20Gi' is not a size; write one such as 24GiB"),
        ("1TiB", NoRoomError, "all instances share 80 MiB there"),
        ("0", NoRoomError, "use more than 0"),
    ],
)
def test_what_no_device_has_is_refused_before_anything_is_asked(
    house: House, need: str, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        room_for(house, need)
    assert control.devices(house.directory)[0].instances == ()


def test_a_share_is_one_of_what_all_share(house: House) -> None:
    with room_for(house, "25%") as room:
        assert room.make(0)
        assert row_of(house).static_bytes == NUM_PAGES * PAGE_BYTES // 4


def test_a_program_joins_a_pool_of_another_size_than_its_settings_say(house: House) -> None:
    neighbour = house.neighbour()
    config = config_of(house).model_copy(update={"host_pool": 8 * PAGE_BYTES})
    with Room([host_device(config)], config, name="t", need=str(NEED), priority=0) as room:
        assert room.make(0)
        assert neighbour.take(NUM_PAGES) == NUM_PAGES - 18


def test_limits_and_floors_of_a_program_are_refused_and_its_priority_is_not(house: House) -> None:
    with room_for(house):
        for set_one in (control.set_limit, control.set_floor):
            answer = set_one("train", "1MiB", directory=house.directory)
            assert answer.outcome is Outcome.REFUSED
            assert "'train' is a program" in answer.reason
        answer = control.set_priority("train", 5, directory=house.directory)
        assert answer.outcome is Outcome.APPLIED


def test_what_a_program_frees_for_a_while_is_asked_back(house: House) -> None:
    neighbour = house.neighbour()
    with room_for(house) as room:
        assert room.make(0)
        with Ledger(house.directory / "host.ledger") as ledger:  # as if nobody had looked in time
            ledger.settle_program(
                room.places[0].row, mapped_bytes=0, unmapped_bytes=0, announced_bytes=0
            )
        assert neighbour.take(NUM_PAGES) == NUM_PAGES
        neighbour.rest(NUM_PAGES - 2)
        with Ledger(house.directory / "host.ledger") as ledger:
            ledger.announce(room.places[0].row, NEED)
        room.look([])
        assert neighbour.view().asked_bytes == NEED
