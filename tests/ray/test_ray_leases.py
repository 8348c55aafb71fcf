"""A door's leases: the right node, a wait where there is none, another one where it is gone."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.loops import on_a_loop

from kvcached_gateway.admin.views import ModelRow
from kvcached_gateway.errors import RefusedError
from kvcached_gateway.lease import Ask, Ending, Woken
from kvcached_gateway.settings.config import ModelSettings, Settings
from kvcached_ray.inside import TOKEN
from kvcached_ray.leases import Avoided, NodeLeases
from kvcached_ray.report import Place, Standing, Table

MODELS = {
    "a": ModelSettings(id="a", aliases=("alias",), max_wait_seconds=5.0),
    "picky": ModelSettings(id="picky", nodes=("gpu=h200",), max_wait_seconds=0.05),
    "adapter": ModelSettings(id="adapter", adapter_of="a", path="/adapter"),
    "far": ModelSettings(id="far", url="http://10.0.0.7"),
}
SETTINGS = Settings(path=Path("/models.yaml"), models=MODELS)


def node(name: str, state: str | None = None, *, joined: int = 1, label: str = "") -> Standing:
    labels = frozenset({name, label})
    place = Place(name, name, labels, f"http://{name}", f"http://{name}:1", f"token-{name}")
    return Standing(place, joined, models={} if state is None else {"a": ModelRow("a", state)})


class Cluster:
    """Answers what a door asks, and keeps it."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.sent: list[tuple[str, Avoided]] = []
        self.accused: list[tuple[str, int]] = []
        self.leases = NodeLeases(lambda: SETTINGS, self.send, self.accuse, "n1")

    async def send(self, model_id: str, avoided: Avoided) -> str:
        self.sent.append((model_id, avoided))
        return self.answers.pop(0) if self.answers else ""

    async def accuse(self, node: str, joined: int) -> None:
        self.accused.append((node, joined))

    def follow(self, *nodes: Standing) -> None:
        self.leases.follow(Table(1, None, nodes))


def ask(model: str = "a", **more: object) -> Ask:
    return Ask(model, "/v1/completions", 10, **more)


async def where(cluster: Cluster, *asks: Ask) -> Sequence[str]:
    return [(await cluster.leases.take(each)).address.url for each in asks]


@on_a_loop
async def test_a_request_goes_where_its_model_is_and_brings_what_the_node_has_to_know() -> None:
    cluster = Cluster()
    cluster.follow(node("n1"), node("n2", "warm"))
    lease = await cluster.leases.take(ask("alias", class_name="chat", deadline_seconds=1.5))
    assert lease.model_id == "a"
    assert (lease.address.url, lease.address.is_gateway) == ("http://n2", True)
    headers = dict(lease.address.headers)
    assert 1 <= int(headers.pop("X-Kvcached-Deadline-Ms")) <= 1500
    assert headers == {TOKEN: "token-n2", "X-Kvcached-Class": "chat"}
    assert lease.woken is Woken.NONE
    assert cluster.sent == []


@on_a_loop
async def test_of_two_nodes_the_one_with_fewer_requests_of_this_door_is_asked() -> None:
    cluster = Cluster()
    cluster.follow(node("n1", "warm"), node("n2", "warm"))
    assert await where(cluster, ask(), ask(), ask("adapter")) == [
        "http://n1",
        "http://n2",
        "http://n1",
    ]


@on_a_loop
async def test_a_lease_that_ended_counts_no_more_and_ends_once() -> None:
    cluster = Cluster()
    cluster.follow(node("n1", "warm"), node("n2", "warm"))
    lease = await cluster.leases.take(ask())
    lease.end(Ending.DONE, status=200)
    lease.end(Ending.DONE, status=200)
    assert cluster.leases.num_own("n1", "a") == 0
    assert await where(cluster, ask()) == ["http://n1"]


@on_a_loop
async def test_a_cold_model_goes_where_the_cluster_says() -> None:
    cluster = Cluster("n2")
    cluster.follow(node("n1"), node("n2"))
    assert await where(cluster, ask("adapter")) == ["http://n2"]
    assert cluster.sent == [("a", frozenset())]


@on_a_loop
async def test_a_node_that_did_not_answer_is_told_of_and_asked_no_more() -> None:
    cluster = Cluster("n2")
    cluster.follow(node("n1", "warm"), node("n2"))
    lease = await cluster.leases.take(ask())
    lease.end(Ending.DIED_BEFORE)
    await asyncio.sleep(0)
    assert cluster.accused == [("n1", 1)]
    assert await where(cluster, ask(is_again=True)) == ["http://n2"]
    assert cluster.sent == [("a", frozenset({("n1", 1)}))]
    cluster.follow(node("n1", "warm", joined=2), node("n2"))
    assert await where(cluster, ask()) == ["http://n1"]


@on_a_loop
async def test_an_engine_that_died_within_an_answer_says_nothing_of_its_node() -> None:
    cluster = Cluster()
    cluster.follow(node("n1", "warm"))
    (await cluster.leases.take(ask())).end(Ending.DIED_WITHIN)
    await asyncio.sleep(0)
    assert cluster.accused == []
    assert await where(cluster, ask()) == ["http://n1"]


@on_a_loop
async def test_a_request_waits_until_there_is_a_node() -> None:
    cluster = Cluster()
    taking = asyncio.ensure_future(cluster.leases.take(ask()))
    await asyncio.sleep(0.01)
    assert not taking.done()
    cluster.follow(node("n1", "warm"))
    assert (await taking).address.url == "http://n1"


@on_a_loop
async def test_a_node_is_told_what_the_wait_for_it_left_of_a_deadline() -> None:
    cluster = Cluster()
    taking = asyncio.ensure_future(cluster.leases.take(ask(deadline_seconds=4.0)))
    await asyncio.sleep(0.01)
    cluster.follow(node("n1", "warm"))
    lease = await taking
    left_ms = int(lease.address.headers["X-Kvcached-Deadline-Ms"])
    assert left_ms <= 4000 - round(1000 * lease.waited_seconds) < 4000


@on_a_loop
async def test_the_clients_own_deadline_ends_the_wait_for_a_node() -> None:
    with pytest.raises(RefusedError) as caught:
        await Cluster().leases.take(ask(deadline_seconds=0.02))
    assert (caught.value.status, caught.value.code) == (504, "deadline")


@on_a_loop
async def test_a_request_that_no_node_takes_is_refused_after_its_wait() -> None:
    cluster = Cluster()
    cluster.follow(node("n1"))
    with pytest.raises(
        RefusedError, match=r"no node of the cluster took model 'picky' within 0.05 s"
    ):
        await cluster.leases.take(ask("picky"))
    with pytest.raises(RefusedError) as caught:
        await cluster.leases.take(ask("nobody"))
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


@on_a_loop
async def test_a_model_that_is_served_elsewhere_is_reached_through_the_nearest_node() -> None:
    cluster = Cluster()
    cluster.follow(node("n0"), node("n1"))
    assert await where(cluster, ask("far")) == ["http://n1"]
    cluster.follow(node("n0"))
    assert await where(cluster, ask("far")) == ["http://n0"]
