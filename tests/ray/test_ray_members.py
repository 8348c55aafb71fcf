"""What the cluster knows of its nodes: from their reports, until they are silent or given up."""

from collections.abc import Callable

import pytest

from kvcached_gateway.admin.views import DeviceRow, ModelRow
from kvcached_gateway.control.moves import Scene
from kvcached_gateway.policy.placement import DeviceRoom, PlacedModel
from kvcached_gateway.settings.config import PlacementSettings
from kvcached_ray.members import PROMISE_SECONDS, SILENT_SECONDS, Members
from kvcached_ray.report import Place, Report, Rules

GIB = 1 << 30
SETTINGS = PlacementSettings()
RULES = Rules(b"{}", None)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def members(clock: Callable[[], float]) -> Members:
    return Members(clock)


def report(
    node: str,
    *rows: ModelRow,
    name: str = "",
    start: str = "1",
    rules: Rules | None = RULES,
    is_draining: bool = False,
    placed: dict[str, tuple[str, ...]] | None = None,
) -> Report:
    place = Place(
        node, name or node, frozenset({node}), f"http://{node}", f"http://{node}:1", start
    )
    models = tuple(
        PlacedModel(model, 1.0, 10 * GIB, current=devices, allowed=frozenset({"g0"}))
        for model, devices in (placed or {}).items()
    )
    scene = Scene(models, (DeviceRoom("g0", 80 * GIB),), frozenset())
    return Report(place, is_draining, rows, (DeviceRow("g0", 80 * GIB, GIB),), scene, rules)


def test_a_node_that_is_new_has_to_say_all_of_it(members: Members) -> None:
    assert not members.reported(report("n1", rules=None))
    assert list(members) == []
    assert members.reported(report("n1"))
    assert members.reported(report("n1", rules=None))
    assert not members.reported(report("n1", rules=None, start="2"))
    assert members.table().rules == RULES


def test_a_change_of_state_is_news_and_a_request_is_none(members: Members) -> None:
    members.reported(report("n1", ModelRow("a", "starting")))
    before = members.version
    members.reported(report("n1", ModelRow("a", "busy", num_leases=1), rules=None))
    assert members.version == before + 1
    members.reported(report("n1", ModelRow("a", "busy", num_leases=2), rules=None))
    members.reported(report("n1", ModelRow("a", "warm"), rules=None))
    members.reported(report("n1", ModelRow("a", "busy", num_leases=2), rules=None))
    assert members.version == before + 1
    assert members.table().nodes[0].models["a"].num_leases == 2


def test_other_rules_are_news(members: Members) -> None:
    members.reported(report("n1"))
    before = members.version
    members.reported(report("n1", rules=Rules(b"{1}", None)))
    assert members.version == before + 1
    assert members.table().rules == Rules(b"{1}", None)


def test_a_later_cluster_counts_on_from_higher_numbers(clock: Clock) -> None:
    members = Members(clock, first=1000)
    members.reported(report("n1"))
    assert members.version > 1000
    assert members.table().nodes[0].joined > 1000


def test_a_node_that_says_nothing_is_given_up(members: Members, clock: Clock) -> None:
    members.reported(report("n1"))
    members.reported(report("n2"))
    clock.now += SILENT_SECONDS
    members.reported(report("n2", rules=None))
    assert members.forget_silent() == []
    clock.now += 0.1
    before = members.version
    assert members.forget_silent() == ["n1"]
    assert members.version == before + 1
    assert [place.id for place in members] == ["n2"]


def test_a_node_that_did_not_answer_is_given_up_once_and_may_come_back(members: Members) -> None:
    members.reported(report("n1"))
    (first,) = members.table().nodes
    assert members.gone("n1", first.joined)
    assert not members.gone("n1", first.joined)
    assert not members.reported(report("n1", rules=None))
    assert members.reported(report("n1"))
    (second,) = members.table().nodes
    assert second.joined > first.joined
    assert not members.gone("n1", first.joined)


def test_two_nodes_of_one_name_are_told_apart(members: Members) -> None:
    members.reported(report("id-of-one", name="10.0.0.7"))
    members.reported(report("id-of-two", name="10.0.0.7"))
    members.reported(report("id-of-two", name="10.0.0.7", rules=None))
    assert [place.name for place in members] == ["10.0.0.7", "10.0.0.7-id-of-"]


def test_whoever_asks_for_a_cold_model_hears_the_same_until_it_shows(
    members: Members, clock: Clock
) -> None:
    for node in ("n1", "n2"):
        members.reported(report(node, placed={"a": (), "b": ()}))
    first = members.send("a", (), SETTINGS)
    assert first is not None
    assert members.send("a", (), SETTINGS) is first
    other = members.send("b", (), SETTINGS)
    assert other is not None
    assert other.node != first.node
    clock.now += PROMISE_SECONDS + 1
    assert members.send("a", (), SETTINGS) is not first


def test_a_promise_ends_with_what_it_promised(members: Members) -> None:
    members.reported(report("n1", placed={"a": ()}))
    first = members.send("a", (), SETTINGS)
    members.reported(report("n1", ModelRow("a", "starting"), rules=None, placed={"a": ("g0",)}))
    members.reported(report("n1", rules=None))
    assert members.send("a", (), SETTINGS) is not first


def test_a_model_is_sent_to_no_node_that_is_gone_or_avoided_or_unfit(members: Members) -> None:
    for node in ("n1", "n2"):
        members.reported(report(node, placed={"a": ()}))
    first = members.send("a", (), SETTINGS)
    assert first is not None
    joined = {node.place.id: node.joined for node in members.table().nodes}
    second = members.send("a", (), SETTINGS, {(first.node, joined[first.node])})
    assert second is not None
    assert second.node != first.node
    members.gone(second.node, joined[second.node])
    third = members.send("a", (), SETTINGS)
    assert third is not None
    assert third.node == first.node
    assert members.send("a", ("another",), SETTINGS) is None


def test_a_model_that_a_report_leaves_out_is_cold_and_as_large_as_it_was(members: Members) -> None:
    members.reported(report("n1", placed={"a": ("g0",), "b": ()}))
    members.reported(report("n1", rules=None))
    (site,) = [one.site() for one in members._members.values()]
    assert [(model.id, model.current) for model in site.models.values()] == [("a", ()), ("b", ())]
    assert site.models["a"] == site.models["b"]._replace(id="a")
