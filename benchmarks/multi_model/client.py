"""The client: requests go out when the schedule says, whatever became of those before."""

import asyncio
import csv
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from multi_model.workloads import Request, Workload

VOCABULARY = range(3, 500)
Prompt = list[int] | str
# From where a replay begins to the schedule's start: all requests are made by then.
LEAD_SECONDS = 0.1
# A request that has not ended by then counts as failed.
REQUEST_SECONDS = 600.0
# Servers close a connection that is idle for 5 seconds: a request sent at that moment is lost.
IDLE_CONNECTION_SECONDS = 2.0


@dataclass
class Record:
    """What became of one request. Times are the client's, in seconds.

    Attributes:
        model: Which model was asked.
        due_seconds: When the schedule says, from the replay's start.
        late_seconds: How much later the client began with it; the time that it then waits for its
            model to be awake is the server's, not the client's.
        num_in: Tokens of the prompt.
        num_out: Tokens that were asked for.
        num_tokens: Tokens that came.
        ttft_seconds: Until the first token, or None if none came.
        last_seconds: Until the last one, or None.
        error: Why it failed, or nothing.
        turn: How many requests of its conversation came before it.
    """

    model: int
    due_seconds: float
    num_in: int
    num_out: int
    late_seconds: float = 0.0
    num_tokens: int = 0
    ttft_seconds: float | None = None
    last_seconds: float | None = None
    error: str = ""
    turn: int = 0

    @property
    def tpot_seconds(self) -> float | None:
        """Time per token after the first, or None where there is none."""
        if self.ttft_seconds is None or self.last_seconds is None or self.num_tokens < 2:  # noqa: PLR2004
            return None
        return (self.last_seconds - self.ttft_seconds) / (self.num_tokens - 1)


@dataclass(frozen=True)
class Dialect:
    """How an engine is asked, and where its events say how many tokens there are by now.

    Attributes:
        path: Where requests are posted.
        body: Returns a request from the model's name, the prompt and the tokens wanted.
        num_tokens: Returns the count from an event and the count before it.
    """

    path: str
    body: Callable[[str, Prompt, int], dict[str, Any]]
    num_tokens: Callable[[dict[str, Any], int], int]


def _openai_body(model: str, prompt: Prompt, num_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _openai_count(event: dict[str, Any], before: int) -> int:
    if event.get("usage"):
        return int(event["usage"]["completion_tokens"])
    return before + bool(event.get("choices"))


def _sglang_body(_model: str, prompt: Prompt, num_tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0.0, "max_new_tokens": num_tokens, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": sampling, "stream": True}


def _sglang_count(event: dict[str, Any], before: int) -> int:
    if "error" in event:
        raise ValueError(event["error"].get("message", "the engine said nothing more"))
    return int(event.get("meta_info", {}).get("completion_tokens", before))


OPENAI = Dialect("/v1/completions", _openai_body, _openai_count)
SGLANG = Dialect("/generate", _sglang_body, _sglang_count)


@dataclass(frozen=True)
class Target:
    """Where a model is served."""

    url: str
    name: str
    dialect: Dialect = OPENAI


class Gate(Protocol):
    """What a request passes before it is sent: where models take turns to be awake."""

    async def enter(self, model: int) -> None:
        """Return when the model may be asked.

        Raises:
            ValueError: If it may not be asked at all; the request has failed then.
        """

    def leave(self, model: int) -> None:
        """Say that a request of the model has ended."""


async def replay(
    workload: Workload,
    targets: Sequence[Target],
    *,
    seed: int = 0,
    gate: Gate | None = None,
    on_done: Callable[[Record], None] = lambda _record: None,
    encode: Callable[[list[int]], Prompt] = list,
    drain_seconds: float = REQUEST_SECONDS,
) -> list[Record]:
    """Send a workload's requests when they are due; return all records in the order of arrival.

    Args:
        workload: The schedule.
        targets: Where each model is served.
        seed: Of the prompts; the same workload gets the same prompts for the same seed.
        gate: What each request passes first.
        on_done: Told of each request that ended.
        encode: Returns what is sent for a prompt's tokens: they themselves, or a text.
        drain_seconds: How long after the last request comes all may go on; what has not ended by
            then has failed.
    """
    bodies = [
        targets[request.model].dialect.body(
            targets[request.model].name, encode(prompt), request.num_out
        )
        for request, prompt in zip(workload.requests, prompts(workload, seed), strict=True)
    ]
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        start = time.perf_counter() + LEAD_SECONDS
        left_seconds = LEAD_SECONDS + workload.seconds + drain_seconds
        until = asyncio.get_running_loop().time() + left_seconds
        tasks = [
            asyncio.create_task(_one(session, targets, request, body, start, until, gate, on_done))
            for request, body in zip(workload.requests, bodies, strict=True)
        ]
        return await asyncio.gather(*tasks)


def prompts(workload: Workload, seed: int = 0) -> list[list[int]]:
    """Return the tokens of each request's prompt; those of a conversation begin alike.

    Another workload has others: a server may still have the prompts of the one before in its cache.
    """
    own = f"{seed} {workload.name}"
    alone = random.Random(own)
    return [
        (random.Random(f"{own} {request.conversation}") if request.conversation else alone).choices(
            VOCABULARY, k=request.num_in
        )
        for request in workload.requests
    ]


async def _one(  # noqa: PLR0917  what a request is made of
    session: aiohttp.ClientSession,
    targets: Sequence[Target],
    request: Request,
    body: dict[str, Any],
    start: float,
    until: float,
    gate: Gate | None,
    on_done: Callable[[Record], None],
) -> Record:
    sizes = (request.num_in, request.num_out)
    record = Record(request.model, request.at_seconds, *sizes, turn=request.turn)
    await asyncio.sleep(start + request.at_seconds - time.perf_counter())
    began = time.perf_counter()
    record.late_seconds = began - start - request.at_seconds
    is_inside = False
    try:
        async with asyncio.timeout_at(until):
            if gate is not None:
                await gate.enter(request.model)
                is_inside = True
            # A model that was swapped in listens elsewhere than before.
            await _stream(session, targets[request.model], body, record, began)
        if record.num_tokens != request.num_out:
            record.error = f"{record.num_tokens} of {request.num_out} tokens came"
    except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
        record.error = f"{type(error).__name__}: {error}"
    finally:
        if gate is not None and is_inside:
            gate.leave(request.model)
    on_done(record)
    return record


async def _stream(
    session: aiohttp.ClientSession,
    target: Target,
    body: dict[str, Any],
    record: Record,
    began: float,
) -> None:
    count: Callable[[dict[str, Any], int], int] = target.dialect.num_tokens
    async with session.post(target.url + target.dialect.path, json=body) as response:
        if response.status != 200:  # noqa: PLR2004
            raise ValueError(f"status {response.status}: {(await response.text())[:200]}")
        rest = b""
        async for received in response.content.iter_any():
            now = time.perf_counter()
            *lines, rest = (rest + received).split(b"\n")
            for line in lines:
                data = line.removeprefix(b"data: ").strip()
                if not line.startswith(b"data: ") or data == b"[DONE]":
                    continue
                before = record.num_tokens
                record.num_tokens = count(json.loads(data), before)
                if record.num_tokens > before:
                    record.last_seconds = now - began
                    if record.ttft_seconds is None:
                        record.ttft_seconds = now - began


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write records as a table, a line each."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Record)])
        table.writeheader()
        table.writerows(asdict(record) for record in records)


def read_records(path: Path) -> list[Record]:
    """Read what `write_records` wrote."""

    def number(text: str) -> float | None:
        return float(text) if text else None

    with path.open(newline="", encoding="utf-8") as file:
        return [
            Record(
                model=int(row["model"]),
                due_seconds=float(row["due_seconds"]),
                num_in=int(row["num_in"]),
                num_out=int(row["num_out"]),
                late_seconds=float(row["late_seconds"]),
                num_tokens=int(row["num_tokens"]),
                ttft_seconds=number(row["ttft_seconds"]),
                last_seconds=number(row["last_seconds"]),
                error=row["error"],
                turn=int(row.get("turn") or 0),  # earlier records have none
            )
            for row in csv.DictReader(file)
        ]
