"""The client of `gateway_gpu`: requests go out when they are due; tokens and times come back."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
from gateway_schedule import Due

ANSWER_SECONDS = 900.0
OK = 200


@dataclass
class Answer:
    """What became of a request.

    Attributes:
        due: The request.
        token_ids: The tokens that came.
        ttft_seconds: From when it was sent to the first of them; None if none came.
        late_seconds: How much later than due it was sent.
        woken: What the gateway says that its model needed first, or nothing.
        error: Why it failed, or nothing.
    """

    due: Due
    token_ids: list[int] = field(default_factory=list)
    ttft_seconds: float | None = None
    late_seconds: float = 0.0
    woken: str = ""
    error: str = ""

    def is_within(self, goal_seconds: float) -> bool:
        """Whether it was answered, and began in time."""
        return not self.error and (self.ttft_seconds or 0.0) <= goal_seconds


async def send(url: str, schedule: Sequence[Due]) -> list[Answer]:
    """Send each request when it is due, whatever became of those before; return all answers."""
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        begin = time.perf_counter()
        return await asyncio.gather(*(_ask(session, due, begin) for due in schedule))


async def _ask(session: aiohttp.ClientSession, due: Due, begin: float) -> Answer:
    answer = Answer(due)
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
                return answer
            async for line in response.content:
                data = line.removeprefix(b"data: ").strip()
                if not line.startswith(b"data: ") or data == b"[DONE]":
                    continue
                ids = json.loads(data)["choices"][0].get("token_ids") or []
                if ids and answer.ttft_seconds is None:
                    answer.ttft_seconds = time.perf_counter() - sent
                answer.token_ids += ids
        if len(answer.token_ids) != due.num_tokens:
            answer.error = f"{len(answer.token_ids)} of {due.num_tokens} tokens came"
    except (aiohttp.ClientError, TimeoutError, LookupError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer
