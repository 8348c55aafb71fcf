"""How near an instance is to the end of its memory: by hand-made views, and by a real ledger."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.ledger.policy import Policy
from kvcached_core.ledger.reach import pressure, reachable_bytes
from kvcached_core.ledger.view import DeviceView, InstanceView

PAGE = 16
NUM_PAGES = 100
CAPACITY = NUM_PAGES * PAGE


def instance(number: int = 0, *, limit: int | None = None, **pages: int) -> InstanceView:
    """Return an instance; sizes in pages, and what is resident is for something or idle."""
    sizes = {f"{name}_bytes": count * PAGE for name, count in pages.items()}
    states = ("used", "cached", "idle", "weights")
    resident = sum(sizes.get(f"{name}_bytes", 0) for name in states)
    numbers = dict.fromkeys((field.name for field in fields(InstanceView)), 0)
    known = {
        **numbers,
        **sizes,
        "row": RowKey(number, number + 1),
        "name": f"engine-{number}",
        "engine": "none",
        "page_bytes": PAGE,
        "resident_bytes": resident,
        "limit_bytes": None if limit is None else limit * PAGE,
    }
    return InstanceView(**known)


def device(*instances: InstanceView, device_free: int | None = None) -> DeviceView:
    free = None if device_free is None else device_free * PAGE
    return DeviceView("host", CAPACITY, instances, free)


def reachable(*instances: InstanceView, device_free: int | None = None) -> int:
    """Return the pages that the first one could reach."""
    return reachable_bytes(device(*instances, device_free=device_free), instances[0]) // PAGE


def test_alone_an_instance_reaches_all_that_its_requests_do_not_use() -> None:
    alone = instance(used=20, cached=30, idle=5, promised=2)
    assert reachable(alone) == 80
    assert pressure(device(alone), alone) == 20 / 100


def test_neighbours_give_what_is_idle_and_cached_and_keep_what_requests_use() -> None:
    mine = instance(used=10)
    neighbour = instance(1, used=30, cached=40, idle=10)
    assert reachable(mine, neighbour) == 10 + 40 + 10
    assert reachable(mine, instance(1, used=90)) == 0
    assert pressure(device(mine, instance(1, used=90)), mine) == 1


def test_neighbours_lend_below_their_floors_while_they_do_not_wait() -> None:
    mine = instance(used=10)
    assert reachable(mine, instance(1, used=10, cached=40, floor=30)) == 40 + 40
    assert reachable(mine, instance(1, used=10, floor=70)) == 80
    # One that waits keeps what it waits for of its floor.
    assert reachable(mine, instance(1, used=10, cached=40, floor=30, waiting=5)) == 40 + 20
    assert reachable(mine, instance(1, used=10, floor=70, waiting=5)) == 80 - 5


def test_below_its_floor_an_instance_reaches_what_the_requests_of_others_use() -> None:
    mine = instance(used=10, floor=30)
    assert reachable(mine, instance(1, used=90)) == 20
    assert reachable(mine, instance(1, used=90, floor=80)) == 10


def test_a_limit_bounds_it() -> None:
    neighbour = instance(1, cached=50)
    assert reachable(instance(used=10, cached=5, limit=40), neighbour) == 5 + 25
    full = instance(used=40, limit=40)
    assert pressure(device(full, neighbour), full) == 1
    # Lowered below what it holds: it gives back first.
    assert reachable(instance(used=10, cached=20, limit=15), neighbour) == 5
    over = instance(used=30, limit=15)
    assert pressure(device(over), over) == 1


def test_what_is_announced_for_weights_is_not_for_requests() -> None:
    assert reachable(instance(used=10), instance(1, static=60)) == 30
    assert reachable(instance(used=10, static=60)) == 30


def test_weights_that_neighbours_offer_can_be_had_and_their_others_cannot() -> None:
    mine = instance(used=10, weights=20)
    assert reachable(mine, instance(1, weights=50)) == 20
    assert reachable(mine, instance(1, weights=50, weights_offered=50)) == 20 + 50
    assert reachable(mine, instance(1, weights=30, weights_offered=30, floor=60)) == 40 + 30


def test_own_weights_are_neither_below_a_limit_nor_for_requests() -> None:
    assert reachable(instance(used=10, cached=5, weights=50, limit=30)) == 5 + 15
    assert reachable(instance(used=10, weights=50, weights_offered=50)) == 40


def test_what_strangers_hold_of_a_gpu_cannot_be_had() -> None:
    mine = instance(used=10, cached=5)
    assert reachable(mine, device_free=20) == 25
    assert reachable(mine, instance(1, cached=8, promised=4), device_free=20) == 5 + 16 + 8
    assert reachable(mine, device_free=0) == 5


def test_what_is_on_its_way_counts_once() -> None:
    assert reachable(instance(used=10), instance(1, used=60, idle=30, coming=30)) == 30


def test_who_waits_is_at_its_end_whatever_it_holds() -> None:
    mine = instance(used=10, cached=5, waiting=3)
    assert pressure(device(mine), mine) == 1


def test_less_than_a_page_is_nothing() -> None:
    mine = instance(used=10)
    odd = DeviceView("host", 10 * PAGE + PAGE - 1, (mine,))
    assert pressure(odd, mine) == 1


def test_an_instance_that_holds_nothing_is_at_its_end_only_where_nothing_is_left() -> None:
    new = instance()
    assert pressure(device(new), new) == 0
    assert pressure(device(new, instance(1, used=NUM_PAGES)), new) == 1


counts = st.integers(0, 40)


@given(
    st.lists(
        st.builds(
            dict,
            used=counts,
            cached=counts,
            idle=counts,
            promised=counts,
            static=counts,
            floor=counts,
            waiting=counts,
            coming=counts,
            limit=st.none() | counts,
        ),
        min_size=1,
        max_size=4,
    ),
    st.none() | counts,
)
def test_it_is_a_share_and_grows_with_what_a_neighbours_requests_use(
    rows: list[dict[str, int]], device_free: int | None
) -> None:
    instances = [instance(number, **row) for number, row in enumerate(rows)]
    before = device(*instances, device_free=device_free)
    for row in instances:
        assert 0 <= pressure(before, row) <= 1
        assert reachable_bytes(before, row) >= 0
    if len(instances) > 1 and not rows[1]["coming"] and not rows[1]["waiting"]:
        busier = {**rows[1], "used": rows[1]["used"] + rows[1]["cached"], "cached": 0}
        after = device(instances[0], instance(1, **busier), *instances[2:], device_free=device_free)
        assert pressure(after, instances[0]) >= pressure(before, instances[0])


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(ledger_directory(tmp_path / "kv") / "host.ledger", CAPACITY) as opened:
        yield opened


class Engine:
    """An engine in a real ledger, with no pages behind it."""

    def __init__(self, ledger: Ledger, name: str, policy: Policy) -> None:
        self.ledger = ledger
        self.row = ledger.register(name=name, engine="none", page_bytes=PAGE, policy=policy)
        self.used = self.cached = 0

    def take(self, num_pages: int) -> int:
        """Map as many pages for requests as are promised; ask the others for the rest."""
        wanted = num_pages * PAGE
        granted = self.ledger.promise(self.row, wanted, PAGE, is_waiting=True) // PAGE
        if granted < num_pages:
            self.ledger.ask_peers(self.row, (num_pages - granted) * PAGE)
        self.used += granted
        self.settle(mapped_bytes=granted * PAGE)
        return granted

    def settle(self, **changes: int) -> None:
        used, cached = self.used * PAGE, self.cached * PAGE
        self.ledger.settle(self.row, **changes, used_bytes=used, cached_bytes=cached)

    def finish(self) -> None:
        """End all requests; what they held is cached now."""
        self.used, self.cached = 0, self.used + self.cached
        self.settle()

    def give(self) -> int:
        """Give what others asked for, and say so."""
        wanted = self.ledger.wanted(self.row)
        num_pages = min(wanted.asked_bytes // PAGE, self.cached)
        self.ledger.acknowledge(self.row, num_pages * PAGE, num_asked=wanted.num_asked)
        self.cached -= num_pages
        self.settle(unmapped_bytes=num_pages * PAGE)
        return num_pages

    def pressure(self) -> float:
        view = self.ledger.view()
        return pressure(view, next(row for row in view.instances if row.row == self.row))


@pytest.mark.parametrize(
    ("mine", "theirs", "fill", "most"),
    [
        (Policy(), Policy(), 60, 40),
        (Policy(limit_bytes=30 * PAGE), Policy(), 60, 30),
        (Policy(), Policy(floor_bytes=70 * PAGE), 60, 40),
        (Policy(floor_bytes=50 * PAGE), Policy(limit_bytes=50 * PAGE), 80, 50),
    ],
)
def test_it_reaches_one_with_the_last_page_that_a_real_ledger_lets_an_instance_have(
    ledger: Ledger, mine: Policy, theirs: Policy, fill: int, most: int
) -> None:
    neighbour, engine = Engine(ledger, "a", theirs), Engine(ledger, "b", mine)
    neighbour.take(fill)
    seen = []
    while engine.take(1):
        seen.append(engine.pressure())
    assert engine.used == most
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert all(value < 1 for value in seen[:-1])


def test_a_neighbours_cache_counts_as_free_until_its_requests_use_it(ledger: Ledger) -> None:
    neighbour, engine = Engine(ledger, "a", Policy()), Engine(ledger, "b", Policy())
    neighbour.take(90)
    engine.take(5)
    assert engine.pressure() == 5 / 10
    neighbour.finish()
    assert engine.pressure() == 5 / 100
    while engine.take(1) or neighbour.give():
        pass
    assert engine.used == NUM_PAGES
    assert engine.pressure() == 1


def test_who_waits_says_one_and_no_more_when_it_has_what_it_waited_for(ledger: Ledger) -> None:
    neighbour, engine = Engine(ledger, "a", Policy()), Engine(ledger, "b", Policy())
    neighbour.take(60)
    neighbour.finish()
    engine.take(70)
    assert engine.used == 40
    assert engine.pressure() == 1
    assert neighbour.give() == 30
    assert engine.take(30) == 30
    assert engine.pressure() == 70 / 100
