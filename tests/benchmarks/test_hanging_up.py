"""A client that may hang up tells whole answers, those that it broke off, and what went wrong."""

import asyncio
import json

import httpx
import pytest
from parts.hanging_up import ANSWERED, BROKEN_OFF, ask


def told(num_out: int, num_read: int, *, num_sent: int, status: int = 200) -> str:
    """Ask a server that sends so many tokens, one in each event."""
    events = [f"data: {json.dumps({'choices': [{'token_ids': [7]}]})}\n\n"] * num_sent
    content = "".join([*events, "data: [DONE]\n\n"])

    async def main() -> str:
        transport = httpx.MockTransport(lambda _: httpx.Response(status, text=content))
        async with httpx.AsyncClient(transport=transport, base_url="http://there") as session:
            return await ask(session, "model", [1, 2], num_out, num_read)

    return asyncio.run(main())


def test_an_answer_is_whole_or_broken_off_when_its_client_has_enough() -> None:
    assert told(5, 5, num_sent=5) == ANSWERED
    assert told(5, 2, num_sent=5) == BROKEN_OFF


def test_an_answer_that_is_too_short_or_refused_is_no_answer() -> None:
    with pytest.raises(ValueError, match="3 of 5 tokens came"):
        told(5, 5, num_sent=3)
    with pytest.raises(ValueError, match="status 500"):
        told(5, 5, num_sent=5, status=500)
