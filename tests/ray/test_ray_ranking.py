"""Which node a request goes to: one where its model is up before one where it has to come."""

from kvcached_gateway.admin.views import ModelRow
from kvcached_ray.ranking import eligible, matches, ranked
from kvcached_ray.report import Place, Standing


def place(name: str, *labels: str) -> Place:
    return Place(name, name, frozenset({name, *labels}), f"http://{name}", f"http://{name}:1", "t")


def node(
    name: str, state: str | None = None, num: int = 0, *, is_draining: bool = False
) -> Standing:
    rows = {} if state is None else {"a": ModelRow("a", state, num_leases=num)}
    return Standing(place(name), 1, is_draining, rows)


def order(*nodes: Standing, own: dict[str, int] | None = None) -> list[str]:
    return [one.place.name for one in ranked("a", nodes, lambda name: (own or {}).get(name, 0))]


def test_a_model_that_is_whole_goes_before_one_that_yielded_and_that_before_one_that_starts() -> (
    None
):
    nodes = node("n1", "starting"), node("n2", "yielded"), node("n3", "busy", 9), node("n4", "warm")
    assert order(*nodes) == ["n4", "n3", "n2", "n1"]


def test_nodes_where_a_model_is_cold_failed_or_ends_are_no_answer() -> None:
    assert order(node("n1"), node("n2", "cold"), node("n3", "failed"), node("n4", "draining")) == []


def test_of_two_nodes_that_have_a_model_the_one_with_fewer_requests_goes_first() -> None:
    assert order(node("n1", "busy", 3), node("n2", "busy", 2)) == ["n2", "n1"]
    waiting = Standing(place("n3"), 1, models={"a": ModelRow("a", "busy", num_waiting=1)})
    assert order(node("n2", "busy", 2), waiting) == ["n3", "n2"]


def test_requests_that_no_report_tells_of_yet_count() -> None:
    nodes = node("n1", "busy", 1), node("n2", "busy", 2)
    assert order(*nodes, own={"n1": 3}) == ["n2", "n1"]


def test_a_node_that_drains_or_did_not_answer_is_asked_for_nothing() -> None:
    nodes = [node("n1", is_draining=True), node("n2"), node("n3")]
    assert [one.place.name for one in eligible((), nodes, {("n2", 1)})] == ["n3"]
    came_back = Standing(place("n2"), 2)
    assert eligible((), [came_back], {("n2", 1)}) == [came_back]


def test_a_label_a_name_and_nothing_match() -> None:
    there = place("n1", "gpu=h200", "10.0.0.7")
    assert matches((), there)
    assert matches(("n1",), there)
    assert matches(("gpu=h100", "gpu=h200"), there)
    assert not matches(("gpu=h100",), there)
