"""What every engine keeps; a module that imports these tests has a `house` fixture.

It is a `House` whose engine under test is a port's: see `helpers.house` and `helpers.served`.
"""

import os
from unittest.mock import patch

import pytest

from helpers.forked import exit_code_of_child
from helpers.house import NEIGHBOUR, House, Neighbour
from helpers.served import ENGINE, NUM_PAGES, PAGE_BYTES, Served
from kvcached_core import control
from kvcached_core.control import Outcome
from kvcached_core.errors import NoRoomError
from kvcached_core.ledger.ledger import Ledger

NO_LIMIT = "none"


def size_of(num_pages: int) -> str:
    return f"{num_pages * PAGE_BYTES}"


def set_limit(house: House, limit: str) -> None:
    answer = control.set_limit(ENGINE, limit, directory=house.directory, wait_seconds=0)
    assert answer.outcome is not Outcome.REFUSED, answer.reason


def leave_cached_and_idle(served: Served, *, is_running: bool) -> int:
    """Leave four pages cached and the rest of five idle; return how many are used."""
    served.send("a", 3)
    served.send("b", 4, is_cached=True)
    served.send("c", 2)
    served.turn()
    served.end("b")
    served.end("c")
    if not is_running:
        served.end("a")
    served.turn()
    return 3 if is_running else 1


def trim(house: House) -> None:
    control.trim([ENGINE], directory=house.directory, wait_seconds=0)


def names_in_ledger(house: House) -> list[str]:
    with Ledger(house.directory / "host.ledger") as ledger:
        return [view.name for view in ledger.view().instances]


# Growth


def test_before_the_first_request_page_0_is_mapped_and_no_other(house: House) -> None:
    served = house.start()
    served.expect(used=1)
    assert house.neighbour().take(NUM_PAGES) == NUM_PAGES - 1


def test_the_row_says_what_the_kv_of_a_token_takes(house: House) -> None:
    served = house.start()
    num_blocks = served.engine.pools[0].geometry.blocks_per_page
    assert served.view().token_bytes == PAGE_BYTES // (num_blocks * served.block_tokens)


def test_a_request_has_its_pages_before_its_step_and_what_was_not_needed_goes_back(
    house: House,
) -> None:
    served = house.start()
    served.send("a", 4)
    served.turn()
    served.expect(used=4)
    served.grow("a")
    served.turn()
    served.expect(used=5)
    assert house.neighbour().take(NUM_PAGES) == NUM_PAGES - 5


def test_requests_take_the_whole_device_where_nobody_else_is(house: House) -> None:
    served = house.start()
    served.send("a", NUM_PAGES // 2)
    served.send("b", NUM_PAGES // 2)
    served.turn()
    served.expect(used=NUM_PAGES, is_waiting=None)
    assert served.names == ["a", "b"]


def test_pages_are_mapped_ahead_while_requests_run_and_stay_when_they_are_needed(
    house: House,
) -> None:
    served = house.start(min_spare_pages=1, max_spare_pages=2)
    served.send("a", 4)
    served.turn()
    served.expect(used=4, idle=2)
    served.grow("a")
    served.turn()
    served.expect(used=5, idle=1)


def test_what_ended_requests_leave_is_used_before_more_is_mapped(house: House) -> None:
    served = house.start()
    served.send("a", 6)
    served.turn()
    served.end("a")
    served.turn()
    served.expect(used=1, idle=5)
    served.send("b", 4)
    served.turn()
    served.expect(used=4, idle=2)


def test_the_cache_lives_on_while_there_is_memory_and_is_evicted_when_there_is_none(
    house: House,
) -> None:
    served = house.start()
    served.send("a", 6, is_cached=True)
    served.turn()
    served.end("a")
    served.turn()
    served.expect(used=1, cached=5)
    neighbour = house.neighbour()
    neighbour.take(NUM_PAGES - 6 - 2)
    served.send("b", 5)
    served.turn()
    assert served.names == ["b"]
    held = served.view()
    assert held.resident_bytes == 8 * PAGE_BYTES
    assert held.cached_bytes > 0


# What nobody needs


def test_what_nobody_needs_goes_back_a_few_pages_with_each_schedule(house: House) -> None:
    served = house.start(idle_seconds=0)
    served.send("a", 2)
    served.send("b", 12)
    served.turn()
    served.expect(used=14)
    served.end("b")
    served.turn()
    served.expect(used=2, idle=4)
    served.turn()
    served.expect(used=2)


def test_behind_the_last_request_all_of_it_goes(house: House) -> None:
    served = house.start(idle_seconds=0)
    served.send("a", 14)
    served.turn()
    served.end("a")
    served.turn()
    served.expect(used=1)


@pytest.mark.parametrize("is_running", [False, True])
def test_a_trim_takes_what_no_request_needs_and_leaves_what_runs(
    house: House, *, is_running: bool
) -> None:
    served = house.start()
    used = leave_cached_and_idle(served, is_running=is_running)
    served.expect(used=used, cached=4, idle=5 - used)
    trim(house)
    look(served)
    served.expect(used=used)
    assert house.neighbour().take(NUM_PAGES) == NUM_PAGES - used


def look(served: Served) -> None:
    """Let the engine look what is wanted: in its next step, or because it is rung."""
    if served.has_requests:
        served.turn()
    else:
        served.heed()


# Limits


def test_a_limit_takes_cached_pages_of_an_idle_engine(house: House) -> None:
    served = house.start()
    served.send("a", 8, is_cached=True)
    served.turn()
    served.end("a")
    served.turn()
    served.expect(used=1, cached=7)
    set_limit(house, size_of(4))
    served.heed()
    served.expect(used=1, cached=3)
    assert house.neighbour().take(NUM_PAGES) == NUM_PAGES - 4


def test_a_limit_takes_idle_pages_first_and_then_cached_ones_while_requests_run(
    house: House,
) -> None:
    served = house.start()
    served.send("a", 3)
    served.send("b", 4, is_cached=True)
    served.send("c", 2)
    served.turn()
    served.end("b")
    served.end("c")
    served.turn()
    served.expect(used=3, cached=4, idle=2)
    set_limit(house, size_of(7))
    served.turn()
    served.expect(used=3, cached=4)
    set_limit(house, size_of(5))
    served.turn()
    served.expect(used=3, cached=2)
    assert served.names == ["a"]


def test_a_limit_below_what_runs_stops_the_last_request_until_it_is_lifted(house: House) -> None:
    served = house.start()
    served.send("a", 3)
    served.send("b", 5)
    served.turn()
    served.expect(used=8)
    set_limit(house, size_of(4))
    served.turn()
    served.expect(used=8, owed=4)
    assert served.names == ["a", "b"]
    served.grow("a")
    served.turn()
    assert served.names == ["a"]
    served.turn()
    served.expect(used=4)
    assert served.names == ["a"]
    set_limit(house, NO_LIMIT)
    served.hears()
    served.turn()
    assert served.names == ["a", "b"]
    served.expect(used=9)


def test_a_limit_that_is_lifted_in_time_leaves_no_debt_and_stops_nobody(house: House) -> None:
    served = house.start()
    served.send("a", 3)
    served.send("b", 5)
    served.turn()
    set_limit(house, size_of(4))
    served.turn()
    served.expect(used=8, owed=4)
    set_limit(house, NO_LIMIT)
    served.hears()
    served.turn()
    served.expect(used=8)
    served.grow("a")
    served.turn()
    served.expect(used=9)
    assert served.names == ["a", "b"]


def test_what_is_owed_goes_when_the_last_request_leaves_it_in_the_cache(house: House) -> None:
    served = house.start()
    served.send("a", 8, is_cached=True)
    served.turn()
    set_limit(house, size_of(3))
    served.turn()
    served.expect(used=8, owed=5)
    served.end("a")
    served.turn()
    served.expect(used=1, cached=2)


@pytest.mark.parametrize(("num_idle", "num_owed"), [(3, 1), (4, 0), (0, 4)])
def test_what_idle_pages_pay_is_not_owed(house: House, num_idle: int, num_owed: int) -> None:
    served = house.start()
    served.send("a", 7 - num_idle)
    if num_idle:
        served.send("b", num_idle)
    served.turn()
    served.end("b")
    served.turn()
    served.expect(used=7 - num_idle, idle=num_idle)
    set_limit(house, size_of(3))
    served.turn()
    num_idle_left = max(num_idle - 4, 0)
    served.expect(used=7 - num_idle, idle=num_idle_left, owed=num_owed)


# Copies of cached blocks


def copy(served: Served, name: str) -> None:
    """Begin a copy of the blocks of a running request, which is called as the request is."""
    ids_of = {request.name: served.block_ids(request) for request in served.running}
    served.engine.pools[0].hold(ids_of[name], name)


@pytest.mark.parametrize("is_running", [True, False])
def test_a_trim_takes_a_page_of_which_a_copy_is_open_only_when_that_has_ended(
    house: House, *, is_running: bool
) -> None:
    served = house.start()
    served.send("a", 3)
    served.send("b", 4, is_cached=True)
    served.send("c", 2)
    served.turn()
    copy(served, "b")
    for name in ["b", "c"] if is_running else ["b", "c", "a"]:
        served.end(name)
    served.turn()
    used = 3 if is_running else 1
    trim(house)
    look(served)
    served.expect(used=used, idle=4, asked=4)
    served.turn()
    served.expect(used=used, idle=4, asked=4)
    served.engine.release("b")
    served.turn()
    served.expect(used=used)
    assert house.neighbour().take(NUM_PAGES) == NUM_PAGES - used


def test_a_neighbour_that_asks_again_gets_no_more_than_it_wants_when_copies_have_ended(
    house: House,
) -> None:
    served = house.start()
    neighbour = house.neighbour()
    served.send("a", 4)
    served.send("b", 4, is_cached=True)
    served.send("c", 8, is_cached=True)
    served.turn()
    copy(served, "b")
    served.end("b")
    served.turn()
    served.end("c")
    served.turn()
    served.expect(used=4, cached=12)
    assert neighbour.take(10) == 0
    served.turn()
    assert neighbour.take(10) == 8  # pages of which no copy is open do not wait for one
    served.turn()
    served.engine.release("b")
    served.turn()
    assert neighbour.take(2) == 2
    assert served.names == ["a"]
    view = served.view()
    assert (view.asked_bytes, view.coming_bytes) == (0, 0)


def test_no_request_stops_for_a_page_that_only_a_copy_keeps_and_none_begins_on_it(
    house: House,
) -> None:
    served = house.start()
    served.send("a", 3)
    served.send("b", 2)
    served.send("c", 3)
    served.turn()
    served.expect(used=8)
    copy(served, "c")
    set_limit(house, size_of(6))
    served.turn()
    served.expect(used=8, owed=2)
    served.grow("a")
    served.turn()
    assert served.names == ["a", "b"]
    for _ in range(3):
        served.turn()
        assert served.names == ["a", "b"]
        served.expect(used=6, idle=2, is_waiting=None)
    served.engine.release("c")
    served.turn()
    served.expect(used=6, is_waiting=None)
    assert served.names == ["a", "b"]


def test_an_engine_that_sleeps_waits_for_copies_and_holds_page_0_alone_then(house: House) -> None:
    served = house.start()
    served.send("a", 4, is_cached=True)
    served.turn()
    copy(served, "a")
    served.end("a")
    served.turn()
    trim(house)
    look(served)
    served.expect(used=1, idle=3, asked=3)
    num_open = []

    def finish(_port: object) -> None:
        num_open.append(served.engine.holds.num_holders)

    with patch.object(type(served.engine.port), "finish_copies", finish):
        served.sleep()
    assert num_open == [1]
    assert not served.engine.holds
    served.expect(used=1)


# Floors


def test_what_lies_free_below_a_floor_is_lent_to_requests_and_comes_back_on_demand(
    house: House,
) -> None:
    served = house.start()
    neighbour = house.neighbour(floor=6 * PAGE_BYTES)
    served.send("a", 6)
    served.send("b", 6)
    served.turn()
    served.expect(used=12)
    assert neighbour.take(6) == 4
    served.turn()
    served.expect(used=12, owed=2, is_waiting=None)
    served.grow("a")
    served.turn()
    assert served.names == ["a"]
    assert neighbour.take_when_rung(2) == 2
    served.turn()
    served.expect(used=7, idle=3, is_waiting=True)
    assert neighbour.view().resident_bytes == neighbour.view().floor_bytes


def test_what_lies_free_below_a_floor_is_not_mapped_ahead(house: House) -> None:
    served = house.start(min_spare_pages=4, max_spare_pages=4)
    house.neighbour(floor=(NUM_PAGES - 3) * PAGE_BYTES)
    served.send("a", 2)
    served.turn()
    served.expect(used=2, idle=1)


def test_an_engine_below_its_own_floor_gets_what_requests_of_others_hold(house: House) -> None:
    neighbour = house.neighbour()
    served = house.start(floor=8 * PAGE_BYTES)
    neighbour.take(NUM_PAGES)
    served.send("a", 6)
    served.turn()
    served.expect(used=1, is_waiting=True)
    num_owed = neighbour.instance.wanted_pages()[1]
    assert 5 <= num_owed <= 7
    neighbour.rest(num_owed)
    neighbour.give(num_owed)
    served.hears()
    served.turn()
    served.expect(used=6)


# Refusals


def short_of_two(house: House) -> tuple[Served, Neighbour]:
    """Return an engine whose request lacks pages that its neighbour could give, and this."""
    served, neighbour = house.start(), house.neighbour()
    neighbour.take(10)
    neighbour.rest(3)
    served.send("a", 8)
    served.turn()
    served.expect(used=1, is_waiting=True)
    assert served.names == []
    return served, neighbour


def test_a_request_without_room_asks_a_neighbour_and_runs_when_it_has_given(
    house: House,
) -> None:
    served, neighbour = short_of_two(house)
    assert 2 <= neighbour.view().asked_bytes // PAGE_BYTES <= 3
    neighbour.give(3)
    served.hears()
    served.turn()
    served.expect(used=8)
    assert served.names == ["a"]


def test_an_engine_that_waits_is_promised_nothing_that_others_could_use(house: House) -> None:
    _, neighbour = short_of_two(house)
    neighbour.rest(-3)
    assert neighbour.take(NUM_PAGES) == NUM_PAGES - 10 - 1


@pytest.mark.parametrize("is_other_running", [False, True])
def test_a_request_that_is_aborted_while_it_was_refused_leaves_nobody_waiting(
    house: House, *, is_other_running: bool
) -> None:
    served, neighbour = house.start(), house.neighbour()
    if is_other_running:
        served.send("other", 2)
        served.turn()
    used = 2 if is_other_running else 1
    neighbour.take(12)
    served.send("a", 8)
    served.turn()
    served.expect(used=used, is_waiting=True)
    served.end("a")
    served.turn()
    served.expect(used=used)


def test_no_page_is_mapped_ahead_while_a_neighbour_waits_for_memory(house: House) -> None:
    served = house.start(min_spare_pages=3, max_spare_pages=3)
    neighbour = house.neighbour()
    served.send("a", 2)
    served.turn()
    served.grow("a")
    served.turn()
    served.expect(used=3, idle=3)
    assert neighbour.take(10) == 10  # all that is free
    assert neighbour.take(4) == 0
    for _ in range(2):  # also while what was given lies free
        served.turn()
        served.expect(used=3)
    assert neighbour.take_when_rung(4) == 3
    served.turn()
    served.expect(used=3)


# Pressure


@pytest.mark.parametrize("is_running", [False, True])
def test_a_neighbour_gets_idle_pages_first_then_cached_ones_and_no_requests(
    house: House, *, is_running: bool
) -> None:
    served, neighbour = house.start(), house.neighbour()
    used = leave_cached_and_idle(served, is_running=is_running)
    is_waiting = None if is_running else False
    num_idle = 5 - used
    assert neighbour.take(7) == 7  # all that is free
    assert neighbour.take(num_idle) == 0
    look(served)
    served.expect(used=used, cached=4, is_waiting=is_waiting)
    assert neighbour.take_when_rung(num_idle) == num_idle
    assert neighbour.take(2) == 0
    look(served)
    served.expect(used=used, cached=2, is_waiting=is_waiting)
    assert neighbour.take_when_rung(2) == 2
    assert neighbour.take(NUM_PAGES) == 0
    look(served)
    served.expect(used=used, is_waiting=is_waiting)
    assert neighbour.take_when_rung(NUM_PAGES) == 2
    served.turn()
    served.expect(used=used, is_waiting=is_waiting)
    assert served.names == (["a"] if is_running else [])


def test_an_idle_engine_gives_more_than_its_first_pages_in_one_look(house: House) -> None:
    served, neighbour = house.start(), house.neighbour()
    served.send("a", 14)
    served.turn()
    served.end("a")
    served.turn()
    served.expect(used=1, idle=13)
    assert neighbour.take(NUM_PAGES) == 2
    served.heed()
    served.expect(used=1)
    assert neighbour.take_when_rung(NUM_PAGES) == 13


# Sleep and wake


def test_a_sleeping_engine_holds_page_0_alone_and_serves_when_it_is_awake(house: House) -> None:
    served, neighbour = house.start(), house.neighbour()
    served.send("a", 3)
    served.send("b", 3, is_cached=True)
    served.turn()
    served.end("a")
    served.end("b")
    served.turn()
    served.expect(used=1, cached=3, idle=2)
    served.sleep()
    served.expect(used=1)
    assert neighbour.take(NUM_PAGES) == NUM_PAGES - 1
    neighbour.rest(8)
    neighbour.give(8)
    with served.waking(4 * PAGE_BYTES):
        assert served.view().static_bytes == 4 * PAGE_BYTES
        assert neighbour.take(8) == 4
    assert served.view().static_bytes == 0
    served.send("c", 4)
    served.turn()
    served.expect(used=4)


def test_a_wake_without_room_is_refused_with_nothing_announced_and_granted_later(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcached_core.engine.ranks.PATIENCE_SECONDS", 0.05)
    served, neighbour = house.start(), house.neighbour()
    served.sleep()
    neighbour.take(NUM_PAGES)
    with pytest.raises(NoRoomError, match="no room to wake up"), served.waking(4 * PAGE_BYTES):
        pytest.fail("there is no room")
    assert served.view().static_bytes == 0
    neighbour.rest(4)
    neighbour.give(4)
    with served.waking(4 * PAGE_BYTES):
        assert served.view().static_bytes == 4 * PAGE_BYTES
    served.expect(used=1)


# The end


def test_an_engine_that_ends_leaves_all_it_had_to_a_neighbour_that_waits(house: House) -> None:
    served, neighbour = house.start(), house.neighbour()
    served.send("a", 6)
    served.turn()
    assert neighbour.take(NUM_PAGES) == NUM_PAGES - 6
    assert neighbour.take(6) == 0
    served.close()
    assert names_in_ledger(house) == [NEIGHBOUR]
    assert neighbour.take_when_rung(6) == 6


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_that_closes_its_parents_engine_takes_nothing_of_it(house: House) -> None:
    served = house.start()
    served.send("a", 4)
    served.turn()
    assert exit_code_of_child(served.close) == 0
    served.expect(used=4)
    served.grow("a")
    served.turn()
    served.expect(used=5)
    assert names_in_ledger(house) == [ENGINE]


def test_beside_a_ledger_that_was_cut_off_an_engine_goes_on_and_writes_its_row_again(
    house: House,
) -> None:
    served, neighbour = house.start(), house.neighbour()
    served.send("a", 4)
    served.turn()
    neighbour.take(3)
    os.truncate(house.directory / "host.ledger", 100)
    served.grow("a")
    served.turn()
    served.expect(used=5)
    assert neighbour.take(NUM_PAGES) == NUM_PAGES - 3 - 5
    assert sorted(names_in_ledger(house)) == [ENGINE, NEIGHBOUR]
    served.end("a")
    served.turn()
    served.expect(used=1, idle=4)
