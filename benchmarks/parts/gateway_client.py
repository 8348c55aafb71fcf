"""A client of gateways and engines: requests go out when due; tokens and times come back."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import aiohttp
from parts.gateway_schedule import Due

from kvcached_gateway.lease import Address

ANSWER_SECONDS = 900.0
OK = 200


@dataclass
class Answer:
    """What became of a request.

    Attributes:
        due: The request.
        token_ids: The tokens that came; none from an engine that says only their text.
        text: Their text.
        ttft_seconds: From when it was sent to the first of them; None if none came.
        late_seconds: How much later than due it was sent.
        woken: What the gateway says that its model needed first, or nothing.
        error: Why it failed, or nothing.
        is_over: Whether all came that will; not if the run was cut off before.
    """

    due: Due
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    ttft_seconds: float | None = None
    late_seconds: float = 0.0
    woken: str = ""
    error: str = ""
    is_over: bool = False

    def is_within(self, goal_seconds: float) -> bool:
        """Whether it was answered, and began in time."""
        return not self.error and (self.ttft_seconds or 0.0) <= goal_seconds


async def send(
    at: str | Address, schedule: Sequence[Due], answers: list[Answer] | None = None
) -> list[Answer]:
    """Send each request when it is due, whatever became of those before; return all answers.

    Args:
        at: Where to: a URL, or an engine's own address.
        schedule: The requests.
        answers: Where the answers are from the beginning on, so that who is cut off has what came.
    """
    found = [] if answers is None else answers
    found += [Answer(due) for due in schedule]
    async with _session(Address(at) if isinstance(at, str) else at) as session:
        begin = time.perf_counter()
        await asyncio.gather(*(_ask(session, answer, begin) for answer in found))
    return found


def _session(address: Address) -> aiohttp.ClientSession:
    connector: aiohttp.BaseConnector = aiohttp.TCPConnector(limit=0)
    if address.socket is not None:
        connector = aiohttp.UnixConnector(address.socket, limit=0)
    return aiohttp.ClientSession(
        address.url,
        headers=address.headers,
        timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS),
        connector=connector,
    )


async def send_first(
    url: str, schedule: Sequence[Due], seconds: float, note: Callable[[list[Answer]], None]
) -> None:
    """Send a first request to each model, all at once; say at each answer what there is so far.

    Args:
        url: Where to.
        schedule: The requests.
        seconds: How long they are waited for.
        note: Called with an answer for each; those that did not come in time have an error.
    """
    found = {due.model: Answer(due, error="it was not up in time") for due in schedule}
    sending = [asyncio.create_task(send(url, [due])) for due in schedule]
    note(list(found.values()))
    with suppress(TimeoutError):
        for coming in asyncio.as_completed(sending, timeout=seconds):
            (answer,) = await coming
            found[answer.due.model] = answer
            note(list(found.values()))
    for task in sending:
        task.cancel()
    await asyncio.gather(*sending, return_exceptions=True)


async def _ask(session: aiohttp.ClientSession, answer: Answer, begin: float) -> None:
    due = answer.due
    await asyncio.sleep(begin + due.at_seconds - time.perf_counter())
    sent = time.perf_counter()
    answer.late_seconds = sent - begin - due.at_seconds
    body = {
        "model": due.model,
        "prompt": list(due.prompt),
        "max_tokens": due.num_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    try:
        async with session.post("/v1/completions", json=body) as response:
            answer.woken = response.headers.get("X-Kvcached-Cold-Start", "")
            if response.status != OK:
                answer.error = f"status {response.status}: {(await response.text())[:300]}"
            async for line in response.content:
                data = line.removeprefix(b"data: ").strip()
                if not line.startswith(b"data: ") or data == b"[DONE]":
                    continue
                choice = json.loads(data)["choices"][0]
                ids, text = choice.get("token_ids") or [], choice.get("text") or ""
                if (ids or text) and answer.ttft_seconds is None:
                    answer.ttft_seconds = time.perf_counter() - sent
                answer.token_ids += ids
                answer.text += text
        is_text_alone = bool(answer.text) and not answer.token_ids
        if not answer.error and not is_text_alone and len(answer.token_ids) != due.num_tokens:
            answer.error = f"{len(answer.token_ids)} of {due.num_tokens} tokens came"
    except (aiohttp.ClientError, TimeoutError, LookupError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.is_over = True
