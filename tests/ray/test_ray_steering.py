"""The gateway's commands for a cluster: passed on to the nodes that they are for."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from helpers.gateway_steering import Written
from helpers.loops import on_a_loop
from helpers.waiting import PATIENCE_SECONDS

from kvcached_core.errors import ConfigError
from kvcached_gateway.admin.admin import admin_app
from kvcached_gateway.admin.views import DeviceRow, ModelRow
from kvcached_gateway.control.decisions import Decisions
from kvcached_gateway.control.moves import Scene
from kvcached_gateway.errors import RefusedVerbError
from kvcached_gateway.settings.config import ModelSettings, Settings
from kvcached_ray.inside import listen_inside, with_token
from kvcached_ray.members import Members
from kvcached_ray.models_file import ModelsFile
from kvcached_ray.report import Place, Report, Rules
from kvcached_ray.steering import ClusterSteering

MODELS = {
    "a": ModelSettings(id="a"),
    "b": ModelSettings(id="b"),
    "x": ModelSettings(id="x", adapter_of="a", path="/x"),
    "far": ModelSettings(id="far", url="http://10.0.0.7"),
}
SETTINGS = Settings(path=Path("/models.yaml"), models=MODELS)
RULES = Rules(SETTINGS.model_dump_json(exclude={"environments"}).encode(), None)


def said(place: Place, *rows: ModelRow) -> Report:
    return Report(
        place,
        is_draining=False,
        models=rows,
        devices=(DeviceRow("host", 10, 5),),
        scene=Scene((), (), frozenset()),
        rules=RULES,
    )


class World:
    """A cluster of nodes that only have an admin port.

    Attributes:
        nodes: What each node was told.
        sent: Cold models that were to be placed.
    """

    def __init__(self, members: Members, stack: AsyncExitStack, file: Path) -> None:
        self.members = members
        self._stack = stack
        self.nodes: dict[str, Written] = {}
        self.sent: list[str] = []
        self.file = file
        self.decisions = Decisions(time.time)

    async def add(self, name: str, *rows: ModelRow) -> Written:
        node = self.nodes[name] = Written(*(rows or (ModelRow("a", "cold"), ModelRow("b", "cold"))))
        runner = web.AppRunner(admin_app(node, with_token(f"of-{name}")))
        url = await listen_inside(self._stack, runner, "127.0.0.1")
        place = Place(name, name, frozenset({name}), "http://unused", url, f"of-{name}")
        self.members.reported(said(place, *(row for row in rows if row.state != "cold")))
        return node

    def send(self, model_id: str) -> str:
        self.sent.append(model_id)
        return next(iter(self.nodes), "")


@asynccontextmanager
async def world(tmp_path: Path) -> AsyncIterator[tuple[World, ClusterSteering]]:
    file = tmp_path / "models.yaml"
    file.write_text("old")
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        made = World(Members(time.monotonic), stack, file)
        steering = ClusterSteering(
            made.members,
            lambda: SETTINGS if made.nodes else None,
            made.decisions,
            made.send,
            session,
            ModelsFile(file, "old"),
        )
        yield made, steering


@on_a_loop
async def test_the_cluster_shows_each_model_once_and_the_devices_of_all(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, steering):
        assert steering.models() == []
        warm = ModelRow("a", "warm", devices=("host",), num_leases=2, num_starts=1, log="/a.log")
        await made.add("n1", replace(warm, state="starting", num_leases=0, num_waiting=3))
        await made.add("n2", warm)
        rows = {row.id: row for row in steering.models()}
        assert list(rows) == ["a", "b", "x", "far"]
        assert (rows["a"].state, rows["a"].devices) == ("warm", ("n2/host", "n1/host"))
        assert (rows["a"].num_leases, rows["a"].num_waiting, rows["a"].num_starts) == (2, 3, 2)
        assert rows["a"].log == ""
        assert [rows[name].state for name in ("b", "x", "far")] == ["cold", "adapter", "cold"]
        assert [row.id for row in steering.devices()] == ["n1/host", "n2/host"]
        assert steering.about().listen == "nodes n1, n2"


@on_a_loop
async def test_a_verb_goes_to_the_nodes_that_have_the_model(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, steering):
        one = await made.add("n1", ModelRow("a", "cold"))
        two = await made.add("n2", ModelRow("a", "warm"))
        assert await steering.steer("a", "sleep") == "n2: a will sleep"
        assert (one.steered, two.steered) == ([], [("a", "sleep")])
        assert await steering.steer("a", "pin") == "n1: a will pin\nn2: a will pin"
        with pytest.raises(RefusedVerbError, match="n2: 'a' is pinned"):
            await steering.steer("a", "stop")


@on_a_loop
async def test_a_cold_model_is_warmed_where_it_is_placed(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, steering):
        node = await made.add("n1", ModelRow("b", "cold"))
        assert await steering.steer("b", "warm") == "n1: b will warm"
        assert (made.sent, node.steered) == (["b"], [("b", "warm")])
        with pytest.raises(
            RefusedVerbError, match="'b' is on no node, so there is nothing to stop"
        ):
            await steering.steer("b", "stop")


@on_a_loop
async def test_an_explanation_is_the_clusters_and_that_of_each_node(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, steering):
        await made.add("n1", ModelRow("a", "warm"))
        made.decisions.add("a", "start", "on n1: least pressed")
        assert await steering.explain("a") == (
            "start: on n1: least pressed\non n1:\n  a is warm: a request came"
        )
        assert (await steering.explain("b")).startswith("b is cold on every node")


@on_a_loop
async def test_a_reload_reads_the_file_once_and_every_node_takes_it_or_says_why(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as (made, steering):
        await made.add("n1")
        two = await made.add("n2")
        made.file.write_text("new")
        assert await steering.reload() == "n1: added one\nn2: added one"
        assert steering._file.text == "new"
        two.reloaded = ConfigError("line 3: no such key")
        made.file.write_text("newer")
        with pytest.raises(ConfigError, match="n2: line 3: no such key"):
            await steering.reload()
        assert (steering._file.text, steering._file.new) == ("new", "new")


@on_a_loop
async def test_a_node_that_does_not_answer_does_not_hide_what_others_say(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, steering):
        await made.add("n1", ModelRow("a", "warm"))
        dead = Place("n2", "n2", frozenset(), "http://unused", "http://127.0.0.1:1", "t")
        made.members.reported(said(dead, ModelRow("a", "warm")))
        text = await steering.steer("a", "sleep")
        assert "n1: a will sleep" in text
        assert "n2: it does not answer" in text


@on_a_loop
async def test_what_passes_is_waited_for(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, steering):
        await made.add("n1", ModelRow("a", "starting"))
        settling = asyncio.ensure_future(steering.settled("a"))
        await asyncio.sleep(0.3)
        assert not settling.done()
        (place,) = made.members
        made.members.reported(said(place, ModelRow("a", "warm")))
        await asyncio.wait_for(settling, PATIENCE_SECONDS)


@on_a_loop
async def test_a_node_answers_nobody_without_its_token(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, _):
        await made.add("n1")
        (place,) = made.members
        async with aiohttp.ClientSession() as session:
            for headers in ({}, {"X-Kvcached-Token": "of-n2"}):
                async with session.get(place.admin_url + "/admin/models", headers=headers) as found:
                    assert found.status == 403


@on_a_loop
async def test_a_cluster_is_not_drained(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, steering):
        with pytest.raises(RefusedVerbError, match="serve shutdown"):
            steering.drain()
