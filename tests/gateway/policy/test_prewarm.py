"""Who comes up before it is asked: by the file or by habit, and beside everybody."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from hypothesis import given
from hypothesis import strategies as st

from kvcached_gateway.policy.prewarm import Habits, Prewarmable, Wish, Wishes, wishes
from kvcached_gateway.settings.units import parse_warm_time

MONDAY = datetime(2026, 11, 30, 6, 50, 30, tzinfo=UTC)  # 7:50 in Berlin
COLD = Prewarmable("m", is_up=False, is_yielded=False, needed_bytes={"gpu": 10, "host": 5})
YIELDED = COLD._replace(is_yielded=True)
ROOM = {"gpu": 10, "host": 5}


def wished(
    *models: Prewarmable,
    habits: Habits | None = None,
    free: dict[str, int] = ROOM,
    moment: datetime = MONDAY,
    now: float = 0.0,
) -> Wishes:
    return wishes(now, moment, models, habits or Habits(), free)


def names(found: Wishes) -> list[str]:
    return [wish.model for wish in found.granted]


def test_a_model_comes_up_at_its_times_wherever_the_machine_is() -> None:
    timed = COLD._replace(warm_at=(parse_warm_time("mon-fri 07:50 Europe/Berlin"),))
    for zone in ("UTC", "America/New_York", "Asia/Tokyo"):
        found = wished(timed, moment=MONDAY.astimezone(ZoneInfo(zone)))
        assert names(found) == ["m"]
    assert "is in warm_at" in wished(timed).reasons["m"]
    assert not names(wished(timed, moment=MONDAY.replace(minute=51)))
    assert not names(wished(timed, moment=MONDAY.replace(day=29)))
    assert not names(wished(timed._replace(is_up=True)))


def test_a_model_comes_up_with_its_companion_and_only_once_for_each_time() -> None:
    first = COLD._replace(id="first", is_up=True, up_since=50.0)
    guard = COLD._replace(id="guard", warm_with=("first",))
    assert names(wished(first, guard)) == ["guard"]
    assert "comes up with 'first'" in wished(first, guard).reasons["guard"]
    assert not names(wished(first._replace(up_since=None), guard))
    stopped = guard._replace(up_since=51.0, down_since=100.0)
    assert not names(wished(first, stopped))
    assert names(wished(first._replace(up_since=200.0), stopped)) == ["guard"]


def learned(num_together: int, num_alone: int = 0) -> tuple[Habits, float]:
    habits, now = Habits(), 0.0
    for index in range(num_together + num_alone):
        for delay in (0.0, 1.0, 2.0):
            habits.arrived("leader", now + delay)
        if index < num_together:
            habits.arrived("m", now + 20.0)
        now += 1_000.0
    return habits, now


def test_a_model_wakes_with_another_when_that_was_its_habit() -> None:
    for together, alone, share in ((20, 0, 1.0), (10, 10, 0.5), (9, 11, 0.45), (19, 0, 0.0)):
        habits, now = learned(together, alone)
        assert not names(wished(YIELDED, habits=habits, now=now)), "nobody asked just now"
        habits.arrived("leader", now)
        assert habits.share("leader", "m") == share
        found = wished(YIELDED, habits=habits, now=now + 1)
        expected = share >= 0.5
        assert bool(found.granted) == expected
        if expected:
            assert found.granted[0].is_guess
            assert f"in {habits.share('leader', 'm'):.0%} of the cases" in found.reasons["m"]
        assert not names(wished(COLD, habits=habits, now=now + 1)), "a start is no guess's price"
        assert not names(wished(YIELDED, habits=habits, now=now + 31))


def test_the_one_that_comes_first_is_not_woken_by_the_one_that_follows() -> None:
    habits, now = learned(30)
    habits.arrived("m", now)
    assert not names(wished(YIELDED._replace(id="leader"), habits=habits, now=now + 1))


def test_guesses_that_come_to_nothing_end_for_a_day() -> None:
    habits, now = learned(30)
    wish = Wish("m", "habit", is_guess=True)
    for hit in (True, False, False, False):
        habits.woken(wish)
        if hit:
            habits.arrived("m", now)
        habits.went_down("m", now)
    assert habits.num_hits("m") == (1, 4)
    habits.arrived("leader", now)
    assert names(wished(YIELDED, habits=habits, now=now))
    habits.woken(wish)
    habits.went_down("m", now)
    assert not names(wished(YIELDED, habits=habits, now=now))
    habits.arrived("leader", now + 86_399)
    assert not names(wished(YIELDED, habits=habits, now=now + 86_399))
    assert names(wished(YIELDED, habits=habits, now=now + 86_400))
    assert habits.num_hits("m") == (0, 0)


def test_guesses_that_come_true_go_on() -> None:
    habits, now = learned(30)
    for step in range(20):
        habits.woken(Wish("m", "habit", is_guess=True))
        habits.arrived("m", now + step)
        habits.went_down("m", now + step)
    assert habits.num_hits("m") == (20, 20)
    habits.woken(Wish("m", "its time"))
    habits.went_down("m", now)
    assert habits.num_hits("m") == (20, 20), "what the file says is no guess"


@given(
    st.lists(st.dictionaries(st.sampled_from(["gpu", "host"]), st.integers(0, 9)), max_size=6),
    st.dictionaries(st.sampled_from(["gpu", "host"]), st.integers(0, 20)),
)
def test_all_that_come_up_have_room_beside_everybody(
    needs: list[dict[str, int]], free: dict[str, int]
) -> None:
    time = (parse_warm_time("daily 7:50 Europe/Berlin"),)
    models = [
        COLD._replace(id=str(index), needed_bytes=need, warm_at=time)
        for index, need in enumerate(needs)
    ]
    found = wished(*models, free=free)
    for place in ("gpu", "host"):
        used = sum(needs[int(name)].get(place, 0) for name in names(found))
        assert used <= free.get(place, 0)
    for index in range(len(models)):
        stays = str(index) not in names(found)
        assert stays == ("it stays down: on " in found.reasons[str(index)])
