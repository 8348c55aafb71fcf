"""What every engine keeps whose weights yield; a module that imports these tests has a `house`.

The engines of that house have weights of four pages, and give them as soon as they are asked.
"""

import os

import pytest

from helpers.forked import exit_code_of_child
from helpers.house import NEIGHBOUR, House, Neighbour
from helpers.served import (
    ENGINE,
    NUM_PAGES,
    PAGE_BYTES,
    Served,
)
from helpers.served import (
    NUM_WEIGHT_PAGES as NUM_WEIGHTS,
)
from helpers.waiting import await_that
from kvcached_core import control
from kvcached_core.control import Outcome
from kvcached_core.engine.beside import Turn
from kvcached_core.errors import NoRoomError
from kvcached_core.ledger.weights import WeightsWish


def idle(house: House, **settings: float) -> Served:
    """Return an engine that has served a request, and has two pages idle beside page 0."""
    served = house.start(**settings)
    served.send("first", 3)
    served.turn()
    served.end("first")
    served.turn()
    served.expect(used=1, idle=2, weights=NUM_WEIGHTS)
    return served


def asleep(house: House, **settings: float) -> Served:
    served = idle(house, **settings)
    served.sleep()
    served.expect(used=1)
    return served


def asleep_beside_a_busy_neighbour(house: House, **settings: float) -> tuple[Served, Neighbour]:
    """Return an engine whose weights have no room, and whose request waits for it."""
    served, neighbour = asleep(house, **settings), house.neighbour()
    take_what_is_free(neighbour, NUM_PAGES - 1)
    served.send("a", 3)
    served.turn()
    served.expect(used=1, static=NUM_WEIGHTS, is_waiting=True)
    assert served.names == []
    return served, neighbour


def num_offered(served: Served) -> int:
    return served.view().weights_offered_bytes // PAGE_BYTES


def take_what_is_free(neighbour: Neighbour, num_pages: int) -> None:
    assert neighbour.take(num_pages) == num_pages
    assert neighbour.instance.room_pages() == 0


def make_way(neighbour: Neighbour, num_pages: int) -> None:
    """Let requests of the neighbour end, and their memory go."""
    neighbour.rest(num_pages)
    neighbour.give(num_pages)


# Giving


def test_an_idle_engine_offers_its_weights_and_takes_them_back_before_a_step(house: House) -> None:
    served = idle(house)
    assert num_offered(served) == NUM_WEIGHTS
    served.send("a", 2)
    served.turn()
    assert num_offered(served) == 0
    assert served.names == ["a"]
    served.end("a")
    served.turn()
    assert num_offered(served) == NUM_WEIGHTS


def test_a_neighbour_gets_what_is_idle_and_cached_before_weights_and_no_more_than_it_wants(
    house: House,
) -> None:
    served, neighbour = idle(house), house.neighbour()
    served.send("b", 3, is_cached=True)
    served.turn()
    served.end("b")
    served.turn()
    served.expect(used=1, cached=2, weights=NUM_WEIGHTS)
    take_what_is_free(neighbour, NUM_PAGES - NUM_WEIGHTS - 3)
    assert neighbour.take(3) == 0
    served.heed()
    served.expect(used=1, weights=NUM_WEIGHTS - 1)
    assert num_offered(served) == NUM_WEIGHTS - 1
    assert neighbour.take_when_rung(3) == 3


def test_all_weights_of_an_idle_engine_go_to_a_neighbour_that_wakes(house: House) -> None:
    served, neighbour = idle(house), house.neighbour()
    assert neighbour.ask_to_wake(NUM_PAGES - 1) is Turn.NEXT
    served.heed()
    served.expect(used=1)
    neighbour.wake_when_rung(NUM_PAGES - 1)


def test_an_engine_in_which_requests_run_keeps_its_weights(house: House) -> None:
    served, neighbour = house.start(), house.neighbour()
    served.send("a", 3)
    served.turn()
    take_what_is_free(neighbour, NUM_PAGES - NUM_WEIGHTS - 3)
    assert neighbour.take(NUM_PAGES) == 0
    served.turn()
    served.expect(used=3, weights=NUM_WEIGHTS, is_waiting=None)
    assert served.names == ["a"]


def test_a_limit_counts_no_weights_and_takes_none(house: House) -> None:
    served = house.start()
    limit = f"{3 * PAGE_BYTES}"
    control.set_limit(ENGINE, limit, directory=house.directory, wait_seconds=0)
    served.send("a", 3, is_cached=True)
    served.turn()
    served.expect(used=3, weights=NUM_WEIGHTS)
    served.end("a")
    served.turn()
    limit = f"{2 * PAGE_BYTES}"
    control.set_limit(ENGINE, limit, directory=house.directory, wait_seconds=0)
    # The first limit has rung, too.
    await_that(lambda: served.heed() or served.view().cached_bytes == PAGE_BYTES)
    served.expect(used=1, cached=1, weights=NUM_WEIGHTS)


def test_a_trim_takes_no_weights(house: House) -> None:
    served = idle(house)
    control.trim([ENGINE], directory=house.directory, wait_seconds=0)
    served.heed()
    served.expect(used=1, weights=NUM_WEIGHTS)


def test_no_page_is_kept_ready_in_an_engine_without_weights(house: House) -> None:
    served, neighbour = house.start(min_spare_pages=1, max_spare_pages=2), house.neighbour()
    served.send("a", 2)
    served.turn()
    served.end("a")
    served.turn()
    neighbour.ask_to_wake(NUM_PAGES - 1)
    served.heed()
    neighbour.wake_when_rung(NUM_PAGES - 1)
    served.send("b", 2)
    for _ in range(3):
        served.turn()
        served.expect(used=1)


# Waking


def test_a_request_to_an_engine_without_weights_waits_for_room_and_runs(house: House) -> None:
    served, neighbour = asleep_beside_a_busy_neighbour(house)
    neighbour.rest(5)
    served.turn()
    assert neighbour.view().asked_bytes == NUM_WEIGHTS * PAGE_BYTES
    neighbour.give(5)
    served.turn()
    assert served.view().activations.num == 1
    make_way(neighbour, 2)
    served.hears()
    served.turn()
    assert served.names == ["a"]
    served.expect(used=3, weights=NUM_WEIGHTS)


def test_a_request_finds_what_is_left_of_the_weights_and_only_the_rest_comes(house: House) -> None:
    served, neighbour = idle(house), house.neighbour()
    assert neighbour.ask_to_wake(NUM_PAGES - 3) is Turn.NEXT
    served.heed()
    served.expect(used=1, weights=2)
    neighbour.wake_when_rung(NUM_PAGES - 3)
    neighbour.offer_weights()
    served.send("a", 1)
    served.turn()
    served.expect(used=1, static=2, weights=2, is_waiting=True)
    neighbour.give_weights(2)
    served.turn()
    served.expect(used=1, weights=NUM_WEIGHTS)
    assert served.names == ["a"]


def test_of_two_that_wake_the_first_comes_first_and_the_second_gives_what_it_has(
    house: House,
) -> None:
    served, first, holder = idle(house), house.neighbour("first"), house.neighbour("holder")
    take_what_is_free(holder, NUM_PAGES - 3 - NUM_WEIGHTS)
    assert holder.take(3) == 0
    served.heed()
    served.expect(used=1, weights=NUM_WEIGHTS - 1)
    assert holder.take_when_rung(3) == 3
    assert first.ask_to_wake(5) is Turn.NEXT
    served.send("a", 1)
    for _ in range(2):
        served.turn()
    served.expect(used=1, static=NUM_WEIGHTS)
    assert served.names == []
    make_way(holder, 2)
    first.wake_when_rung(5)
    served.turn()
    assert served.names == []
    make_way(holder, 4)
    served.turn()
    assert served.names == ["a"]
    served.expect(used=1, weights=NUM_WEIGHTS)


def test_a_wake_whose_room_cannot_come_holds_up_nobody_who_has_to_end_first(house: House) -> None:
    served, neighbour = asleep(house), house.neighbour()
    neighbour.have_weights(NUM_PAGES - NUM_WEIGHTS)
    served.send("a", 1)
    served.turn()
    served.expect(used=1)
    assert neighbour.take(3) == 3
    make_way(neighbour, 3)
    neighbour.offer_weights()
    served.turn()
    served.expect(used=1, static=NUM_WEIGHTS, is_waiting=True)
    neighbour.give_weights(1)
    served.turn()
    assert served.names == ["a"]


def test_two_engines_with_weights_and_no_room_beside_them_do_not_wait_for_each_other(
    house: House,
) -> None:
    served, neighbour = house.start(), house.neighbour()
    neighbour.have_weights(9)
    served.send("a", 4)
    served.turn()
    served.expect(used=1, weights=NUM_WEIGHTS, is_waiting=True)
    take_what_is_free(neighbour, 2)
    await_that(lambda: served.turn() or num_offered(served) == NUM_WEIGHTS)
    assert neighbour.take(3) == 0
    served.turn()
    served.expect(used=1, weights=1, is_waiting=None)
    assert neighbour.take_when_rung(3) == 3
    make_way(neighbour, 5)
    neighbour.offer_weights()
    served.turn()
    served.expect(used=1, weights=1, static=6, is_waiting=True)
    neighbour.give_weights(1)
    served.turn()
    served.expect(used=4, weights=NUM_WEIGHTS)
    assert served.names == ["a"]


def test_a_wake_goes_on_when_its_request_is_gone_and_the_weights_are_offered(house: House) -> None:
    served, neighbour = asleep_beside_a_busy_neighbour(house)
    served.end("a")
    served.turn()
    served.expect(used=1, static=NUM_WEIGHTS, is_waiting=True)
    make_way(neighbour, NUM_WEIGHTS)
    await_that(lambda: served.heed() or num_offered(served) == NUM_WEIGHTS)
    served.expect(used=1, weights=NUM_WEIGHTS)


def test_a_waking_engine_whose_loop_is_paused_goes_on_when_it_is_rung(house: House) -> None:
    served, neighbour = asleep_beside_a_busy_neighbour(house)
    make_way(neighbour, NUM_WEIGHTS)
    await_that(lambda: served.heed() or served.engine.activation.is_active)
    served.expect(used=1, weights=NUM_WEIGHTS, is_waiting=None)


def test_what_strangers_take_while_weights_come_back_is_waited_for(house: House) -> None:
    served = asleep(house)
    assert served.weights is not None
    served.weights.num_available = 2
    served.send("a", 1)
    for _ in range(2):
        served.turn()
        served.expect(used=1, weights=2, static=2, is_waiting=None)
    served.weights.num_available = NUM_WEIGHTS
    served.turn()
    assert served.names == ["a"]
    served.expect(used=1, weights=NUM_WEIGHTS)


# Who gives to whom


@pytest.mark.parametrize(("priority", "num_left"), [(0, NUM_WEIGHTS), (1, NUM_WEIGHTS - 1)])
def test_weights_that_came_back_stay_for_a_while_but_for_a_higher_priority(
    house: House, priority: int, num_left: int
) -> None:
    served, neighbour = asleep(house, weights_kept_seconds=1000), house.neighbour()
    control.set_priority(NEIGHBOUR, priority, directory=house.directory)
    served.send("a", 1)
    served.turn()
    served.end("a")
    served.turn()
    take_what_is_free(neighbour, NUM_PAGES - NUM_WEIGHTS - 1)
    assert neighbour.take(1) == 0
    if num_left < NUM_WEIGHTS:
        served.heed()
    served.expect(used=1, weights=num_left)


@pytest.mark.parametrize(("priority", "num_owed"), [(0, 0), (1, NUM_WEIGHTS)])
def test_requests_stop_for_a_wake_only_where_their_priority_is_lower(
    house: House, priority: int, num_owed: int
) -> None:
    _, neighbour = asleep_beside_a_busy_neighbour(house, priority=priority)
    assert neighbour.instance.wanted_pages()[1] == num_owed


# From outside, and by the clock


def test_a_wish_to_sleep_takes_all_and_a_wish_to_wake_brings_the_weights(house: House) -> None:
    served = idle(house)
    control.sleep(ENGINE, directory=house.directory, wait_seconds=0)
    served.heed()
    served.expect(used=1)
    assert served.view().weights_wish == WeightsWish.NONE
    control.wake(ENGINE, directory=house.directory, wait_seconds=0)
    served.heed()
    served.expect(used=1, weights=NUM_WEIGHTS)
    assert served.view().weights_wish == WeightsWish.NONE
    assert num_offered(served) == NUM_WEIGHTS


def test_an_engine_with_requests_is_not_put_to_sleep(house: House) -> None:
    served = house.start()
    served.send("a", 2)
    served.turn()
    answer = control.sleep(ENGINE, directory=house.directory, wait_seconds=0)
    assert answer.outcome is Outcome.REFUSED
    served.turn()
    served.expect(used=2, weights=NUM_WEIGHTS)


def test_an_engine_that_sleeps_by_the_clock_gives_all_and_wakes_by_request(house: House) -> None:
    served = house.start(sleep_after=0)
    served.send("a", 3, is_cached=True)
    served.turn()
    served.end("a")
    served.turn()
    served.expect(used=1)
    served.send("b", 2)
    served.turn()
    assert served.names == ["b"]
    assert served.view().weights_bytes == NUM_WEIGHTS * PAGE_BYTES


def test_an_idle_engine_sleeps_when_its_time_has_come_though_nobody_rings(house: House) -> None:
    served = house.start(sleep_after=0.1)
    served.send("a", 3)
    served.turn()
    served.end("a")
    served.turn()
    served.expect(used=1, idle=2, weights=NUM_WEIGHTS)
    await_that(lambda: served.heed() or not served.view().weights_bytes)
    served.expect(used=1)


def test_a_wake_from_outside_brings_the_weights_first_or_is_refused(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcached_core.engine.activation.PATIENCE_SECONDS", 0.05)
    served, neighbour = asleep(house), house.neighbour()
    neighbour.take(NUM_PAGES - 3)
    with pytest.raises(NoRoomError, match="no room for the weights"), served.waking(PAGE_BYTES):
        pytest.fail("there is no room")
    served.expect(used=1)
    make_way(neighbour, 3)
    with served.waking(PAGE_BYTES):
        served.expect(used=1, weights=NUM_WEIGHTS, static=1)
    served.send("a", 1)
    served.turn()
    assert served.names == ["a"]


def test_weights_that_came_for_a_refused_wake_may_be_asked_for_at_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcached_core.engine.ranks.PATIENCE_SECONDS", 0.05)
    served = asleep(house)
    house.neighbour().take(NUM_PAGES - 1 - NUM_WEIGHTS)
    with pytest.raises(NoRoomError, match="no room to wake up"), served.waking(PAGE_BYTES):
        pytest.fail("there is no room")
    view = served.view()
    assert view.weights_offered_bytes == view.weights_bytes == NUM_WEIGHTS * PAGE_BYTES


# Accidents


def test_an_engine_that_ends_while_it_wakes_leaves_nothing_announced(house: House) -> None:
    served, neighbour = asleep_beside_a_busy_neighbour(house)
    served.close()
    assert neighbour.take(NUM_PAGES) == 1


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_that_closes_a_waking_engine_ends_no_wake(house: House) -> None:
    served, neighbour = asleep_beside_a_busy_neighbour(house)
    assert exit_code_of_child(served.engine.close) == 0
    served.expect(used=1, static=NUM_WEIGHTS, is_waiting=True)
    make_way(neighbour, NUM_WEIGHTS + 2)
    served.turn()
    assert served.names == ["a"]


def test_a_wake_goes_on_in_a_new_ledger_when_the_old_one_is_damaged(house: House) -> None:
    served, neighbour = asleep_beside_a_busy_neighbour(house)
    os.truncate(house.directory / "host.ledger", 100)
    neighbour.instance.cancel(0)  # it is the first to look into the ledger
    served.turn()
    served.expect(used=1, static=NUM_WEIGHTS, is_waiting=True)
    make_way(neighbour, NUM_WEIGHTS + 2)
    served.turn()
    assert served.names == ["a"]
    served.expect(used=3, weights=NUM_WEIGHTS)
