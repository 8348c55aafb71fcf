"""Where a cold model goes: over all nodes, where the KV cache will be least pressed."""

from kvcached_gateway.policy.placement import DeviceRoom, PlacedModel
from kvcached_gateway.settings.config import PlacementSettings
from kvcached_ray.placing import Choice, Site, choose

GIB = 1 << 30
SETTINGS = PlacementSettings()


def model(
    name: str, *current: str, rate: float = 1.0, weights: int = 10, **more: object
) -> PlacedModel:
    return PlacedModel(
        name, rate, weights * GIB, current=current, allowed=frozenset({"g0", "g1"}), **more
    )


def site(name: str, *models: PlacedModel, capacity: int = 80, **more: frozenset[str]) -> Site:
    rooms = tuple(DeviceRoom(device, capacity * GIB) for device in ("g0", "g1"))
    return Site(name, {one.id: one for one in models}, rooms, **more)


def where(*sites: Site, among: set[str] | None = None, **more: object) -> Choice:
    names = {one.id for one in sites} if among is None else among
    found = choose("new", sites, names, SETTINGS, **more)
    assert found is not None
    return found


NEW = model("new")


def test_a_model_goes_to_the_device_of_all_nodes_that_will_be_least_pressed() -> None:
    busy = site("n1", NEW, model("a", "g0", rate=9), model("b", "g1", rate=8))
    idle = site("n2", NEW, model("c", "g0", rate=7), model("d", "g1", rate=1))
    found = where(busy, idle)
    assert (found.node, found.devices) == ("n2", ("g1",))
    assert "KV pressure ratio" in found.reason


def test_only_nodes_that_it_may_be_on_are_chosen() -> None:
    busy = site("n1", NEW, model("a", "g0", rate=9), model("b", "g1", rate=8))
    assert where(busy, site("n2", NEW), among={"n1"}).node == "n1"
    assert choose("new", [busy], set(), SETTINGS) is None


def test_a_node_where_it_failed_comes_last() -> None:
    failed = site("n1", NEW, failed=frozenset({"new"}))
    assert where(failed, site("n2", NEW, model("a", "g0", rate=9))).node == "n2"
    assert where(failed).node == "n1"


def test_several_devices_are_of_one_node() -> None:
    wide = model("new", tensor_parallel=2)
    # The two least pressed devices of all are g0 of n1 and g0 of n2.
    one = site("n1", wide, model("a", "g1", rate=5))
    two = site("n2", wide, model("b", "g1", rate=4))
    found = where(one, two)
    assert (found.node, sorted(found.devices)) == ("n2", ["g0", "g1"])


def test_what_was_sent_somewhere_counts_before_it_is_there() -> None:
    sites = site("n1", NEW, model("other", rate=5)), site("n2", NEW, model("other", rate=5))
    first = choose("other", sites, {"n1", "n2"}, SETTINGS)
    assert first is not None
    second = where(*sites, promised={"other": first})
    assert (second.node, second.devices) != (first.node, first.devices)


def test_where_it_fits_beside_nobody_those_that_may_go_do_not_count() -> None:
    full = site("n1", NEW, model("a", "g0", weights=75), model("b", "g1", weights=75))
    going = site("n2", NEW, model("c", "g0", weights=75), model("d", "g1", weights=75))
    staying = frozenset({"a", "b"})
    found = where(Site("n1", full.models, full.rooms, staying), going)
    assert found.node == "n2"


def test_a_model_that_fits_nowhere_goes_where_the_fewest_are_and_the_node_says_why() -> None:
    huge = model("new", weights=200)
    found = where(site("n1", huge, model("a", "g0")), site("n2", huge))
    assert (found.node, found.devices) == ("n2", ())
    assert "fits on no node" in found.reason


def test_a_node_where_nothing_ran_yet_is_pressed_by_nobody() -> None:
    known = site("n1", NEW, model("a", "g0"))
    pools = tuple(DeviceRoom(device, 0) for device in ("g0", "g1"))
    found = where(known, Site("n2", {"new": NEW}, pools), Site("n3", {"new": NEW}, pools))
    assert (found.node, found.devices) == ("n2", ())
    sent = {"other": Choice("n2", (), "before")}
    assert where(Site("n2"), Site("n3"), promised=sent).node == "n3"


def test_a_node_that_has_not_looked_at_its_devices_yet_is_still_a_node() -> None:
    assert where(Site("n1")).node == "n1"
