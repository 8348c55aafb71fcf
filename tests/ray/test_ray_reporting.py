"""What a node tells the cluster: all of it while that is new, and then what counts."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from helpers.gateway_front import House, RefusingLeases, make_settings
from helpers.loops import on_a_loop
from helpers.waiting import PATIENCE_SECONDS

from kvcached_gateway.admin.views import DeviceRow, ModelRow
from kvcached_gateway.control.moves import Scene
from kvcached_gateway.settings.config import Settings
from kvcached_gateway.state import State
from kvcached_ray import reporting
from kvcached_ray.report import Place, Report
from kvcached_ray.reporting import Reporter

PLACE = Place("n1", "n1", frozenset(), "http://n1", "http://n1:1", "t")


class Node:
    """A gateway, its controller and the cluster that it reports to."""

    def __init__(self) -> None:
        self.is_draining = False
        self.machine: object | None = object()
        self.rows = [ModelRow("a", "warm")]
        self.heard: list[Report] = []
        self.asks_for_all = 0
        self.error: Exception | None = None
        self.told = asyncio.Event()
        self.house = House(RefusingLeases(), make_settings(), None)
        arguments: list[Any] = [PLACE, self, self, self.house.front(), self.send]
        self.reporter = Reporter(*arguments)

    def models_in_use(self) -> Sequence[ModelRow]:
        return self.rows

    def devices(self) -> Sequence[DeviceRow]:
        return [DeviceRow("host", 10, 5)]

    def scene(self, *, is_whole: bool) -> Scene:
        return Scene((), (), frozenset({"whole"} if is_whole else {"part"}))

    async def send(self, report: Report) -> bool:
        if self.error is not None:
            raise self.error
        self.heard.append(report)
        self.told.set()
        self.asks_for_all -= 1
        return self.asks_for_all < 0

    def whole(self) -> list[bool]:
        """Return which reports told all of it."""
        for report in self.heard:
            assert (report.rules is not None) == ("whole" in report.scene.staying)
        return [report.rules is not None for report in self.heard]


@on_a_loop
async def test_rules_and_cold_models_are_told_once() -> None:
    node = Node()
    assert await node.reporter.report()
    assert await node.reporter.report()
    assert node.whole() == [True, False]
    rules = node.heard[0].rules
    assert rules is not None
    assert Settings.model_validate_json(rules.settings).models == node.house.settings.models
    assert node.heard[1].models == (ModelRow("a", "warm"),)


@on_a_loop
async def test_before_the_first_look_at_the_machine_all_of_it_is_told_again() -> None:
    node = Node()
    node.machine = None
    await node.reporter.report()
    node.machine = object()
    await node.reporter.report()
    await node.reporter.report()
    assert node.whole() == [True, True, False]


@on_a_loop
async def test_a_cluster_that_asks_for_all_of_it_is_told_at_once() -> None:
    node = Node()
    await node.reporter.report()
    node.asks_for_all = 1
    await node.reporter.report()
    assert node.whole() == [True, False, True]


@on_a_loop
async def test_a_cluster_that_cannot_be_told_is_told_all_of_it_later() -> None:
    node = Node()
    await node.reporter.report()
    node.error = ConnectionError("it is gone")
    assert not await node.reporter.report()
    node.error = None
    await node.reporter.report()
    assert node.whole() == [True, True]


@on_a_loop
async def test_other_settings_are_told() -> None:
    node = Node()
    await node.reporter.report()
    node.house.settings = make_settings(max_body_bytes=1000)
    await node.reporter.report()
    assert node.whole() == [True, True]
    assert node.heard[0].rules != node.heard[1].rules


@on_a_loop
async def test_a_request_that_comes_or_goes_is_no_news_and_a_state_is() -> None:
    reporter = Node().reporter
    for before, after in (State.WARM, State.BUSY), (State.BUSY, State.WARM):
        reporter.changed(None, before, after, "a request")
        assert not reporter.news.is_set()
    for after in (State.YIELDED, State.DRAINING, State.FAILED):
        reporter.changed(None, State.WARM, after, "something else")
        assert reporter.news.is_set()
        reporter.news.clear()


@on_a_loop
async def test_news_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "REPORT_SECONDS", 2 * PATIENCE_SECONDS)
    node = Node()
    running = asyncio.ensure_future(node.reporter.run())
    node.is_draining = True
    node.reporter.news.set()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await node.told.wait()
    assert node.heard[0].is_draining
    running.cancel()
