"""What a key may have at once and in a minute, over all that serve HTTP."""

import asyncio

import pytest
from helpers.gateway_front import FakeKey, GivenLeases, PatientLeases, RefusingLeases

from kvcached_gateway.errors import RefusedError
from kvcached_gateway.http.limits import LimitedLeases
from kvcached_gateway.lease import Address, Ask, Ending, Lease

KEYS = {
    "two": FakeKey("two", max_concurrent=2),
    "six": FakeKey("six", requests_per_minute=6),
    "free": FakeKey("free"),
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ask(key: str | None, *, is_again: bool = False) -> Ask:
    return Ask("tiny", "/v1/completions", 10, key=key, is_again=is_again)


def given(clock: Clock) -> LimitedLeases:
    return LimitedLeases(GivenLeases(Address("http://localhost")), KEYS.get, clock)


async def refused(leases: LimitedLeases, what: Ask) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        await leases.take(what)
    return caught.value


def test_a_key_has_so_many_requests_at_once_and_gets_a_place_back_with_each_lease() -> None:
    async def run() -> None:
        leases = given(Clock())
        held = [await leases.take(ask("two")) for _ in range(2)]
        error = await refused(leases, ask("two"))
        assert (error.status, error.code) == (429, "too_many_at_once")
        assert error.retry_after_seconds is not None
        await leases.take(ask("free"))
        held[0].end(Ending.DONE, status=200)
        held[0].end(Ending.DONE, status=200)  # a second end gives nothing back
        await leases.take(ask("two"))
        assert (await refused(leases, ask("two"))).status == 429

    asyncio.run(run())


def test_a_request_that_waits_has_its_place_and_leaves_it_when_it_goes() -> None:
    async def run() -> None:
        leases = LimitedLeases(PatientLeases(), KEYS.get, Clock())
        waiting = [asyncio.create_task(leases.take(ask("two"))) for _ in range(2)]
        await asyncio.sleep(0)
        assert (await refused(leases, ask("two"))).code == "too_many_at_once"
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
        third: asyncio.Task[Lease] = asyncio.create_task(leases.take(ask("two")))
        await asyncio.sleep(0)
        assert not third.done()
        for task in (*waiting, third):
            task.cancel()
        await asyncio.wait((*waiting, third))

    asyncio.run(run())


def test_a_request_that_the_line_refuses_has_no_place() -> None:
    async def run() -> None:
        leases = LimitedLeases(RefusingLeases(), KEYS.get, Clock())
        for _ in range(5):
            assert (await refused(leases, ask("two"))).code == "model_loading"

    asyncio.run(run())


def test_a_key_sends_so_many_a_minute_and_is_told_when_the_next_may_come() -> None:
    async def run() -> None:
        clock = Clock()
        leases = given(clock)
        for _ in range(6):
            await leases.take(ask("six"))
        error = await refused(leases, ask("six"))
        assert (error.status, error.code) == (429, "rate_limit_exceeded")
        assert error.retry_after_seconds == pytest.approx(10)
        clock.now = 9.9
        assert (await refused(leases, ask("six"))).retry_after_seconds == pytest.approx(0.1)
        clock.now = 10.0
        await leases.take(ask("six"))
        clock.now = 10_000.0  # a rest saves up no more than a minute's
        for _ in range(6):
            await leases.take(ask("six"))
        assert (await refused(leases, ask("six"))).status == 429

    asyncio.run(run())


def test_a_request_that_comes_again_is_not_counted_twice() -> None:
    async def run() -> None:
        leases = given(Clock())
        for _ in range(6):
            await leases.take(ask("six"))
        await leases.take(ask("six", is_again=True))

    asyncio.run(run())


def test_who_has_no_key_has_no_limit() -> None:
    async def run() -> None:
        leases = given(Clock())
        for key in (None, "free", "gone"):
            for _ in range(100):
                await leases.take(ask(key))

    asyncio.run(run())
