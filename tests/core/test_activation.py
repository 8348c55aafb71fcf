"""When an engine's weights are offered, given and had back; its ranks and its port are fakes."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.config import read_config
from kvcached_core.engine import activation
from kvcached_core.engine.activation import (
    ALARM_SECONDS,
    LAST_LOOK_SECONDS,
    STALL_SECONDS,
    Activation,
)
from kvcached_core.engine.beside import RankBytes, Turn
from kvcached_core.engine.engine import ElasticEngine
from kvcached_core.engine.weights_kept import WeightsKept
from kvcached_core.errors import NoRoomError
from kvcached_core.ledger.weights import WeightsWish
from kvcached_core.weights.status import WeightStatus

PAGE, NUM_PAGES = 64, 8


def only(rank_bytes: RankBytes) -> int:
    """Return the bytes of the only rank."""
    return rank_bytes if isinstance(rank_bytes, int) else sum(rank_bytes)


class Engine:
    """Weights of eight pages, the ledgers' answers as a test says, and a log of what is told."""

    def __init__(self, **settings: str) -> None:
        self.now = 0.0
        self.num_resident = NUM_PAGES
        self.num_available = NUM_PAGES  # pages that the device has for a wake
        self.num_least = 0  # pages that cannot go
        self.num_more = 0  # pages that were not there when it began
        self.is_copied = self.can_be_woken = True
        self.is_busy_now = False
        self.turn = Turn.NOW
        self.said: list[tuple[Any, ...]] = []
        self.alarms: list[float] = []
        self.num_looks = self.num_emptied = 0
        config = read_config({f"KVCACHED_{key.upper()}": text for key, text in settings.items()})
        self.activation = Activation(self, self, self.status(), config, self.empty)  # type: ignore[arg-type]

    def status(self) -> WeightStatus:
        num_more = self.num_more
        return WeightStatus(
            NUM_PAGES + num_more, self.num_resident + num_more, PAGE, self.is_copied
        )

    def empty(self) -> None:
        self.num_emptied += 1
        self.activation.sleep()

    @property
    def offered(self) -> int:
        """The pages that others may ask for."""
        offers = [numbers[0] for word, *numbers in self.said if word == "offer"]
        return offers[-1] // PAGE if offers else 0

    # As ranks

    def clock(self) -> float:
        return self.now

    def merge(self, status: WeightStatus | None) -> WeightStatus | None:
        return status

    def describe_weights(self, needed_bytes: RankBytes) -> None:
        self.said.append(("needs", only(needed_bytes)))

    def offer_weights(self, rank_bytes: RankBytes, *, is_kept: bool) -> None:
        offered_bytes = only(rank_bytes)
        assert self.num_resident * PAGE >= offered_bytes
        self.is_kept = is_kept
        self.said.append(("offer", offered_bytes))

    def set_alarm(self, seconds: float) -> None:
        self.alarms.append(seconds)

    def clear_waiting(self) -> None:
        self.said.append(("clear",))

    def ask_to_wake(self, missing_bytes: RankBytes) -> Turn:
        self.said.append(("ask", only(missing_bytes)))
        return self.turn

    def woke(self, waited_ns: int, took_ns: int) -> None:
        assert waited_ns >= took_ns > 0
        self.said.append(("woke",))

    def stop_waking(self) -> None:
        self.said.append(("stop",))

    def end_wish(self, wish: WeightsWish) -> None:
        self.said.append(("end wish", wish))

    def is_over(self, deadline: float) -> bool:
        return deadline > 0

    def explain_shortage(self) -> str:
        return "1 GiB is missing"

    # As a port

    def is_busy(self) -> bool:
        return self.is_busy_now

    def weight_status(self) -> WeightStatus:
        self.num_looks += 1
        return self.status()

    def hold_weights(self, num_missing: int) -> WeightStatus:
        num_pages = NUM_PAGES - num_missing
        assert not self.activation.is_active or num_pages == NUM_PAGES, "a step may run"
        if num_pages > self.num_resident:
            assert self.offered == 0, "somebody may ask for what comes back"
        self.said.append(("hold", num_pages))
        most = max(self.num_available, self.num_resident)
        self.num_resident = max(min(num_pages, most), min(self.num_least, self.num_resident))
        return self.status()

    def finish_weights(self) -> None:
        self.said.append(("finish",))


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def idle() -> Engine:
    made = Engine()
    made.activation.rest()
    return made


@pytest.fixture
def asleep(idle: Engine) -> Engine:
    idle.activation.give(NUM_PAGES * PAGE)
    idle.said.clear()
    return idle


def test_an_engine_starts_active_and_says_what_it_needs(engine: Engine) -> None:
    assert engine.activation.is_active
    assert engine.said == [("needs", NUM_PAGES * PAGE)]


def test_an_idle_engine_offers_all_and_takes_it_back_before_a_step(idle: Engine) -> None:
    assert (idle.offered, idle.activation.is_active) == (NUM_PAGES, False)
    assert idle.activation.activate()
    assert (idle.offered, idle.activation.is_active) == (0, True)
    assert ("hold", NUM_PAGES) not in idle.said


def test_what_nobody_can_be_woken_for_is_not_offered(engine: Engine) -> None:
    engine.can_be_woken = False
    assert engine.activation.rest() is None
    assert (engine.offered, engine.activation.is_active) == (0, True)


def test_what_host_memory_does_not_have_is_not_offered_and_looked_for_ever_less_often() -> None:
    engine = Engine()
    engine.is_copied = False
    engine.activation._status = engine.status()
    looked_at = []
    while engine.now < 60:
        num_looks = engine.num_looks
        seconds = engine.activation.rest()
        assert seconds is not None
        assert engine.activation.is_active
        if engine.num_looks > num_looks:
            looked_at.append(engine.now)
        engine.now += seconds
    pauses = [later - sooner for sooner, later in itertools.pairwise(looked_at)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LAST_LOOK_SECONDS
    engine.is_copied = True
    engine.activation.rest()
    assert engine.offered == NUM_PAGES


@pytest.mark.parametrize(
    ("num_bytes", "num_given"),
    [(0, 0), (1, 1), (PAGE, 1), (PAGE + 1, 2), (100 * PAGE, NUM_PAGES)],
)
def test_as_many_whole_pages_are_given_as_are_wanted(
    idle: Engine, num_bytes: int, num_given: int
) -> None:
    assert idle.activation.give(num_bytes) == num_given * PAGE
    assert idle.num_resident == idle.offered == NUM_PAGES - num_given


def test_nothing_is_given_that_was_not_offered_or_that_requests_wait_for(engine: Engine) -> None:
    assert engine.activation.give(PAGE) == 0
    engine.activation.rest()
    engine.is_busy_now = True
    assert engine.activation.give(PAGE) == 0
    assert engine.num_resident == NUM_PAGES


def test_a_wake_asks_for_what_is_missing_and_ends_when_it_is_there(idle: Engine) -> None:
    idle.activation.give(3 * PAGE)
    idle.said.clear()
    assert idle.activation.activate()
    assert idle.said == [
        ("ask", 3 * PAGE),
        ("offer", 0),
        ("hold", NUM_PAGES),
        ("woke",),
        ("stop",),
    ]
    assert idle.activation.is_active


@pytest.mark.parametrize("turn", [Turn.LATER, Turn.NEXT])
def test_a_wake_that_has_to_wait_holds_nothing_and_no_step_runs(asleep: Engine, turn: Turn) -> None:
    asleep.turn = turn
    for _ in range(3):
        assert not asleep.activation.activate()
    assert asleep.num_resident == 0
    assert not asleep.activation.is_active
    asleep.turn = Turn.NOW
    assert asleep.activation.activate()


def test_who_wakes_later_gives_what_is_left_of_it_and_who_wakes_next_does_not(
    idle: Engine,
) -> None:
    idle.activation.give(2 * PAGE)
    idle.is_busy_now = True
    idle.turn = Turn.LATER
    idle.activation.activate()
    assert idle.offered == NUM_PAGES - 2
    assert idle.activation.give(PAGE) == PAGE
    idle.turn = Turn.NEXT
    idle.activation.activate()
    assert idle.said[-2:] == [("ask", 3 * PAGE), ("offer", 0)]
    assert idle.activation.give(PAGE) == 0
    assert idle.num_resident == NUM_PAGES - 3


def test_a_wake_that_has_to_wait_is_woken_if_its_loop_comes_no_more(asleep: Engine) -> None:
    asleep.turn = Turn.LATER
    for _ in range(20):
        asleep.activation.activate()
    assert asleep.alarms == [ALARM_SECONDS]
    asleep.turn = Turn.NOW
    asleep.activation.activate()
    assert asleep.alarms == [ALARM_SECONDS]


def test_a_wake_goes_on_when_its_requests_are_gone(asleep: Engine) -> None:
    asleep.turn = Turn.NEXT
    asleep.activation.activate()
    assert asleep.activation.rest() is not None
    asleep.turn = Turn.NOW
    asleep.activation.rest()
    assert asleep.num_resident == asleep.offered == NUM_PAGES
    assert asleep.activation.rest() is None


def test_what_others_took_meanwhile_is_asked_for_again_and_nothing_fails(asleep: Engine) -> None:
    asleep.num_available = 5
    assert not asleep.activation.activate()
    assert asleep.num_resident == 5
    assert not asleep.activation.is_active
    assert ("woke",) not in asleep.said
    asleep.num_available = NUM_PAGES
    asleep.said.clear()
    assert asleep.activation.activate()
    assert asleep.said[0] == ("ask", 3 * PAGE)


def test_a_call_that_needs_the_weights_waits_for_room_and_says_what_is_missing(
    asleep: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep.turn = Turn.NEXT
    with pytest.raises(NoRoomError, match="1 GiB is missing; it stays asleep"):
        asleep.activation.activate_now()
    assert asleep.said[-1] == ("stop",)
    monkeypatch.setattr(asleep, "is_over", lambda _: setattr(asleep, "turn", Turn.NOW))
    asleep.activation.activate_now()
    assert asleep.activation.is_active


@pytest.mark.parametrize("turn", [Turn.LATER, Turn.NEXT])
@pytest.mark.parametrize("is_wished", [True, False])
def test_a_wish_to_sleep_ends_a_wake_that_waits_for_room(
    asleep: Engine, turn: Turn, *, is_wished: bool
) -> None:
    asleep.turn = turn
    if is_wished:
        asleep.activation.heed(WeightsWish.WAKE)
    else:
        asleep.activation.activate()  # for a request that was given up
    assert asleep.activation.rest() is not None
    asleep.activation.heed(WeightsWish.SLEEP)
    assert asleep.activation.rest() is None
    assert ("stop",) in asleep.said
    assert asleep.said[-1] == ("end wish", WeightsWish.SLEEP)


@pytest.mark.parametrize("turn", list(Turn))
def test_a_call_that_finds_no_room_leaves_what_is_there_to_others(idle: Engine, turn: Turn) -> None:
    idle.activation.give(5 * PAGE)
    idle.turn, idle.num_available = turn, NUM_PAGES - 1
    with pytest.raises(NoRoomError):
        idle.activation.activate_now()
    num_left = idle.num_resident
    assert idle.offered == num_left > 0
    assert idle.activation.give(NUM_PAGES * PAGE) == num_left * PAGE


@pytest.mark.parametrize(("wait", "num"), [("all", 0), ("layers", 1)])
def test_a_call_that_needs_the_weights_finds_all_of_them_where_each_layer_waits(
    wait: str, num: int
) -> None:
    engine = Engine(weights_wait=wait)
    engine.activation.rest()
    engine.activation.give(NUM_PAGES * PAGE)
    assert engine.activation.activate()  # for a step, which waits by itself
    assert ("finish",) not in engine.said
    engine.activation.activate_now()
    assert engine.said.count(("finish",)) == num


def test_weights_for_which_no_step_comes_are_brought_all_the_same() -> None:
    engine = Engine(weights_wait="layers")
    engine.activation.rest()
    for num_wakes, goes_on in enumerate(
        (engine.activation.rest, lambda: engine.activation.note_refused(PAGE)), 1
    ):
        engine.activation.sleep()
        engine.activation.activate()
        assert engine.said.count(("finish",)) == num_wakes - 1
        for _ in range(2):
            goes_on()
            assert engine.said.count(("finish",)) == num_wakes


def test_a_call_that_finds_no_room_leaves_the_wake_to_requests_that_wait(asleep: Engine) -> None:
    asleep.turn = Turn.NEXT
    asleep.is_busy_now = True
    with pytest.raises(NoRoomError):
        asleep.activation.activate_now()
    assert ("stop",) not in asleep.said


def test_who_sleeps_by_the_clock_gives_all_when_nothing_ran_for_so_long() -> None:
    engine = Engine(sleep_after="30")
    assert engine.activation.rest() == 30
    engine.now = 29.0
    assert engine.activation.rest() == 1
    engine.activation.activate()
    assert engine.activation.rest() == 30
    engine.now = 59.0
    assert engine.activation.rest() is None
    assert (engine.num_resident, engine.offered, engine.num_emptied) == (0, 0, 1)
    engine.now = 100.0
    assert engine.activation.rest() is None
    assert engine.num_emptied == 1


def test_a_wish_to_sleep_is_fulfilled_when_nothing_runs_and_ends(engine: Engine) -> None:
    engine.activation.heed(WeightsWish.SLEEP)
    assert engine.num_resident == NUM_PAGES
    assert engine.activation.rest() is None
    assert (engine.num_resident, engine.num_emptied) == (0, 1)
    assert engine.said[-1] == ("end wish", WeightsWish.SLEEP)
    engine.activation.rest()
    assert engine.num_emptied == 1


def test_a_wish_to_sleep_of_who_sleeps_is_over(asleep: Engine) -> None:
    asleep.activation.heed(WeightsWish.SLEEP)
    asleep.activation.rest()
    assert asleep.said[-1] == ("end wish", WeightsWish.SLEEP)
    assert asleep.num_resident == 0


def test_a_wish_to_wake_needs_no_request_and_ends(asleep: Engine) -> None:
    asleep.turn = Turn.NEXT
    asleep.activation.heed(WeightsWish.WAKE)
    assert asleep.activation.rest() is not None
    asleep.turn = Turn.NOW
    assert asleep.activation.rest() is None
    assert asleep.num_resident == asleep.offered == NUM_PAGES
    assert asleep.said.count(("end wish", WeightsWish.WAKE)) == 1


def test_a_wish_to_wake_of_who_runs_is_over(engine: Engine) -> None:
    engine.activation.heed(WeightsWish.WAKE)
    assert engine.said[-1] == ("end wish", WeightsWish.WAKE)


def test_weights_that_host_memory_does_not_have_stay_through_a_sleep(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.is_copied = False
    engine.activation._status = engine.status()
    engine.activation.sleep()
    assert (engine.num_resident, engine.activation.is_active) == (NUM_PAGES, True)
    assert "the weights stay" in caplog.text
    engine.is_copied = True
    engine.activation.sleep()
    assert engine.num_resident == 0


def test_pages_that_do_not_go_are_not_offered_again_until_the_engine_ran(idle: Engine) -> None:
    idle.num_least = 5
    assert idle.activation.give(NUM_PAGES * PAGE) == 3 * PAGE
    assert (idle.num_resident, idle.offered) == (5, 0)
    assert idle.activation.rest() is None
    assert idle.offered == 0
    idle.activation.activate()
    idle.activation.rest()
    assert idle.offered == NUM_PAGES


def stall(engine: Engine, seconds: float) -> None:
    """Let its requests find no memory for so long, while nothing is live."""
    end = engine.now + seconds
    engine.is_busy_now = True
    while engine.now < end:
        engine.activation.note_refused(3 * PAGE)
        engine.now += STALL_SECONDS / 4


def test_requests_that_find_no_memory_for_long_wait_as_if_the_engine_woke(engine: Engine) -> None:
    stall(engine, STALL_SECONDS)
    assert engine.activation.is_active
    stall(engine, STALL_SECONDS)
    assert not engine.activation.is_active
    assert engine.said[-1] == ("clear",)
    engine.turn = Turn.LATER
    assert not engine.activation.activate()
    assert engine.said[-2:] == [("ask", 3 * PAGE), ("offer", NUM_PAGES * PAGE)]
    assert not engine.is_kept
    assert engine.activation.give(2 * PAGE) == 2 * PAGE
    engine.turn = Turn.NOW
    assert engine.activation.activate()
    assert ("ask", 5 * PAGE) in engine.said
    assert engine.num_resident == NUM_PAGES
    engine.activation.rest()
    engine.activation.activate()
    assert engine.said[-1] == ("offer", 0)  # and nothing is asked for


def test_who_gets_memory_now_and_then_does_not_stall(engine: Engine) -> None:
    for _ in range(9):
        stall(engine, STALL_SECONDS)
        engine.now += 2 * STALL_SECONDS
    assert engine.activation.is_active


def test_who_runs_something_now_and_then_does_not_stall(engine: Engine) -> None:
    for _ in range(9):
        stall(engine, STALL_SECONDS)
        engine.activation.note_refused(0)
    assert engine.activation.is_active


def test_who_waited_for_memory_and_has_no_request_any_more_offers_its_weights(
    engine: Engine,
) -> None:
    stall(engine, 2 * STALL_SECONDS)
    engine.is_busy_now = False
    engine.activation.rest()
    assert (engine.offered, engine.is_kept) == (NUM_PAGES, True)
    assert all(word != "ask" for word, *_ in engine.said)


def test_a_sleep_ends_a_wake_that_waits(asleep: Engine) -> None:
    asleep.turn = Turn.NEXT
    asleep.activation.activate()
    asleep.activation.sleep()
    assert ("stop",) in asleep.said
    assert asleep.activation.rest() is None


def test_an_engine_whose_weights_stay_is_always_active() -> None:
    kept = WeightsKept()
    assert kept.activate()
    kept.activate_now()
    kept.sleep()
    kept.heed(WeightsWish.SLEEP)
    assert (kept.is_active, kept.rest(), kept.give(PAGE), kept.can_give) == (True, None, 0, False)


def test_an_engine_yields_weights_only_if_all_its_ranks_do() -> None:
    made: Any = Engine()
    made.merge, made.close = lambda _: None, lambda: None
    engine = ElasticEngine(made, made)
    assert not engine.yield_weights(read_config({}))
    made.merge = lambda status: status
    assert engine.yield_weights(read_config({}))
    assert engine.giving.weights is engine.activation
    engine.close()


STEPS: dict[str, Callable[[Engine], Any]] = {
    "request": lambda engine: setattr(engine, "is_busy_now", True),
    "end": lambda engine: setattr(engine, "is_busy_now", False),
    "room": lambda engine: setattr(engine, "turn", Turn.NOW),
    "no room": lambda engine: setattr(engine, "turn", Turn.NEXT),
    "not its turn": lambda engine: setattr(engine, "turn", Turn.LATER),
    "taken": lambda engine: setattr(engine, "num_available", 4),
    "free": lambda engine: setattr(engine, "num_available", NUM_PAGES),
    "asked": lambda engine: engine.activation.give(3 * PAGE),
    "asked for all": lambda engine: engine.activation.give(NUM_PAGES * PAGE),
    "sleep": lambda engine: engine.activation.heed(WeightsWish.SLEEP),
    "wake": lambda engine: engine.activation.heed(WeightsWish.WAKE),
    "time": lambda engine: setattr(engine, "now", engine.now + 7.0),
}


@given(
    st.lists(st.sampled_from([*STEPS]), max_size=30),
    st.sampled_from([{}, {"sleep_after": "20"}]),
)
def test_whatever_happens_a_step_finds_all_weights_and_all_are_served_in_the_end(
    names: list[str], settings: dict[str, str]
) -> None:
    engine = Engine(**settings)

    def turn() -> None:
        if engine.is_busy_now and engine.activation.activate():
            assert engine.num_resident == NUM_PAGES
            assert engine.offered == 0
            assert engine.activation.give(PAGE) == 0
        elif not engine.is_busy_now:
            engine.activation.rest()
        if engine.activation.is_active:
            assert engine.num_resident == NUM_PAGES
            assert engine.offered == 0

    for name in names:
        STEPS[name](engine)
        turn()
    engine.turn, engine.num_available, engine.is_busy_now = Turn.NOW, NUM_PAGES, True
    turn()
    assert engine.activation.is_active
    engine.is_busy_now = False
    engine.activation._wish = WeightsWish.NONE
    turn()
    assert engine.offered == NUM_PAGES


def test_the_pauses_between_looks_are_those_that_are_named() -> None:
    assert 0 < activation.FIRST_LOOK_SECONDS < LAST_LOOK_SECONDS


def test_what_weights_have_got_beside_them_is_told_once() -> None:
    engine = Engine()
    engine.num_more = 1
    for _ in range(2):
        engine.activation._hold(engine.activation._status.num_pages)
    needs = [said[1] for said in engine.said if said[0] == "needs"]
    assert needs == [NUM_PAGES * PAGE, (NUM_PAGES + 1) * PAGE]
