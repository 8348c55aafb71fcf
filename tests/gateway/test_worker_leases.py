"""Leases over a worker's connection, both of its ends on one loop."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from helpers.gateway_front import GivenLeases, House, PatientLeases, RefusingLeases, make_settings
from helpers.gateway_models import FakeGrantor
from helpers.loops import on_a_loop

from kvcached_gateway.errors import RefusedError
from kvcached_gateway.http.worker_frames import End
from kvcached_gateway.http.worker_leases import WorkerLeases, rules_of
from kvcached_gateway.http.worker_link import WorkerLink
from kvcached_gateway.lease import Address, Ask, Ending, Lease, Woken
from kvcached_gateway.line.line import Line
from kvcached_gateway.observe import Answer
from kvcached_gateway.settings.keys import Key, Keys

ADDRESS = Address("http://localhost", "/run/engine.sock", {"Authorization": "Bearer engine"})
ASK = Ask("tiny", "/v1/completions", 10, is_stream=True, deadline_seconds=1.5, key="me")


@asynccontextmanager
async def linked(house: House) -> AsyncIterator[tuple[WorkerLink, WorkerLeases]]:
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    _, leases = await loop.create_connection(lambda: WorkerLeases(house.front()), sock=ours)
    _, link = await loop.create_connection(WorkerLink, sock=theirs)
    leases.send(rules_of(house.front()))
    await link.rules_came.wait()
    try:
        yield link, leases
    finally:
        link.close()
        await leases.has_ended.wait()


def house(leases: Any, **more: Any) -> House:
    return House(leases, make_settings(), more.pop("keys", None), **more)


async def refused(taking: asyncio.Task[Lease]) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        await taking
    return caught.value


@on_a_loop
async def test_a_lease_comes_over_whole_and_what_becomes_of_it_goes_back() -> None:
    given = GivenLeases(ADDRESS)
    async with linked(house(given)) as (link, leases):
        lease = await link.take(ASK)
        assert given.asks == [ASK]
        assert (lease.model_id, lease.address, lease.woken) == ("tiny", ADDRESS, Woken.NONE)
        assert leases.num_leases == 1
        lease.first_byte()
        lease.end(Ending.DONE, status=200)
        lease.end(Ending.CANCELLED)
        await given.leases[0].ended.wait()
        assert given.leases[0].endings == [(Ending.DONE, 200)]
        assert given.leases[0].num_first_bytes == 1
        assert leases.num_leases == 0


@on_a_loop
async def test_no_answer_begins_on_a_lease_that_is_closed_there_unless_it_did_before() -> None:
    given = GivenLeases(ADDRESS)
    async with linked(house(given)) as (link, _):
        leases = [await link.take(ASK) for _ in range(3)]
        closes = [lease.close for lease in given.leases]
        leases[1].first_byte()
        leases[2].end(Ending.DONE)
        for close in closes:
            assert close is not None
            await close()
        assert given.leases[1].num_first_bytes == 1  # it is known once the other end has answered
        assert not leases[0].first_byte()
        assert leases[1].first_byte()
        leases[0].end(Ending.DIED_BEFORE)
        await given.leases[0].ended.wait()
        assert given.leases[0].num_first_bytes == 0


@on_a_loop
async def test_a_lease_that_is_on_its_way_is_closed_too() -> None:
    given = GivenLeases(ADDRESS)
    async with linked(house(given)) as (link, leases):
        taking = asyncio.create_task(link.take(ASK))
        while not leases.num_leases:  # noqa: ASYNC110  the moment before the answer arrives
            await asyncio.sleep(0)
        close = given.leases[0].close
        assert close is not None
        await close()
        assert not (await taking).first_byte()


@on_a_loop
async def test_nobody_waits_for_a_worker_that_is_gone_to_close_a_lease() -> None:
    given = GivenLeases(ADDRESS)
    async with linked(house(given)) as (link, _):
        await link.take(ASK)
        close = given.leases[0].close
        assert close is not None
        link.came = lambda _message: None  # type: ignore[method-assign]
        closing = asyncio.ensure_future(close())
        await asyncio.sleep(0)
    await closing


@on_a_loop
async def test_a_refusal_comes_over_whole() -> None:
    async with linked(house(RefusingLeases())) as (link, _):
        error = await refused(asyncio.create_task(link.take(ASK)))
        assert (error.status, error.code, error.message, error.retry_after_seconds) == (
            503,
            "model_loading",
            "it loads",
            6.2,
        )


@on_a_loop
async def test_who_leaves_the_line_leaves_it_there_too() -> None:
    patient = PatientLeases()
    async with linked(house(patient)) as (link, leases):
        taking = asyncio.create_task(link.take(ASK))
        await patient.came.wait()
        taking.cancel()
        await patient.left.wait()
        assert leases.num_leases == 0


@on_a_loop
async def test_a_lease_that_crosses_the_leaving_of_its_client_is_given_back() -> None:
    given = GivenLeases(ADDRESS)
    async with linked(house(given)) as (link, leases):
        taking = asyncio.create_task(link.take(ASK))
        while not leases.num_leases:  # noqa: ASYNC110  the moment before the answer arrives
            await asyncio.sleep(0)
        assert not taking.done()
        taking.cancel()
        await given.leases[0].ended.wait()
        assert given.leases[0].endings == [(Ending.CANCELLED, 0)]


@on_a_loop
async def test_the_end_of_a_worker_gives_back_what_it_held_and_waited_for() -> None:
    given, patient = GivenLeases(ADDRESS), PatientLeases()
    async with linked(house(given)) as (link, _):
        await link.take(ASK)
        await link.take(ASK)
    assert [lease.endings for lease in given.leases] == [[(Ending.CANCELLED, 0)]] * 2
    async with linked(house(patient)) as (link, _):
        taking = asyncio.create_task(link.take(ASK))
        await patient.came.wait()
    await patient.left.wait()
    assert (await refused(taking)).code == "draining"


@on_a_loop
async def test_a_worker_gets_no_lease_of_a_model_that_holds_back() -> None:
    held = {"tiny": "it is another one's turn"}
    line = Line(
        {"tiny": FakeGrantor("tiny")},
        make_settings,
        asyncio.get_running_loop().time,
        wanted=lambda _model_id: None,
        held=lambda model_id: held.get(model_id, ""),
    )
    async with linked(house(line)) as (link, leases):
        taking = asyncio.create_task(link.take(ASK))
        await link.front().status()  # an answer comes behind what was asked before it
        assert (line.waiting("tiny"), leases.num_leases) == (1, 0)
        held.clear()
        line.changed("tiny")
        assert (await taking).model_id == "tiny"


@on_a_loop
async def test_a_worker_without_its_controller_refuses() -> None:
    async with linked(house(PatientLeases())) as (link, leases):
        leases.close()
        await link.has_ended.wait()
        assert not link.front().is_ready()
        assert (await refused(asyncio.create_task(link.take(ASK)))).status == 503


@on_a_loop
async def test_a_worker_goes_by_the_rules_that_came_last() -> None:
    keys = Keys((Key(name="me", sha256="0" * 64, models=("tiny",), class_name="chat"),))
    here = house(RefusingLeases(), keys=keys)
    async with linked(here) as (link, leases):
        front = link.front()
        assert front.settings() == here.settings
        assert front.settings().resolve("gpt") == here.settings.resolve("gpt")
        given = front.keys()
        assert isinstance(given, Keys)
        assert given.all == keys.all
        assert front.is_ready()
        here.keys, here.is_ready, here.settings = None, False, make_settings(max_body_bytes=7)
        leases.send(rules_of(here.front()))
        await front.status()  # an answer comes behind them
        assert (front.keys(), front.is_ready()) == (None, False)
        assert front.settings().max_body_bytes == 7


@on_a_loop
async def test_counts_status_and_metrics_are_the_controllers() -> None:
    here = house(RefusingLeases())
    async with linked(here) as (link, _):
        answer = Answer("tiny", None, 200, 0.5, None, 1.5, Woken.WAKE)
        link.answered(answer)
        link.refused(None, "path_not_found")
        link.cancelled("stream")
        front = link.front()
        assert await front.status() == await here.status()
        assert await front.exposition() == await here.exposition()
        assert here.written.told == [
            ("answered", "tiny", None, 200),
            ("refused", None, "path_not_found"),
            ("cancelled", "stream"),
        ]
        assert here.written.answers == [answer]


@on_a_loop
async def test_frames_come_whole_however_they_are_cut() -> None:
    given = GivenLeases(ADDRESS)
    sent = bytearray()

    class Sink(asyncio.Transport):
        def write(self, data: Any) -> None:
            sent.extend(data)

    link = WorkerLink()
    link.connection_made(Sink())
    taking = asyncio.create_task(link.take(ASK))
    await asyncio.sleep(0)
    link.send(End(0, Ending.DONE, 200))
    await asyncio.sleep(0)
    leases = WorkerLeases(house(given).front())
    for byte in sent[:-1]:
        leases.data_received(bytes([byte]))
        await asyncio.sleep(0)
    assert given.asks == [ASK]
    assert not given.leases[0].endings
    leases.data_received(sent[-1:])
    assert given.leases[0].endings == [(Ending.DONE, 200)]
    taking.cancel()
