"""The client: requests go out when the schedule says, whatever became of those before."""

import asyncio
import csv
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from multi_model.workloads import Request, Workload

VOCABULARY = range(3, 500)
Prompt = list[int] | str
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
        """Return when the model may be asked."""

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
) -> list[Record]:
    """Send a workload's requests when they are due; return all records in the order of arrival.

    Args:
        workload: The schedule.
        targets: Where each model is served.
        seed: Of the prompts; the same requests get the same prompts for the same seed.
        gate: What each request passes first.
        on_done: Told of each request that ended.
        encode: Returns what is sent for a prompt's tokens: they themselves, or a text.
    """
    prompts = random.Random(seed)
    bodies = [
        targets[request.model].dialect.body(
            targets[request.model].name,
            encode(prompts.choices(VOCABULARY, k=request.num_in)),
            request.num_out,
        )
        for request in workload.requests
    ]
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        start = time.perf_counter() + 0.1
        tasks = [
            asyncio.create_task(
                _one(session, targets[request.model], request, body, start, gate, on_done)
            )
            for request, body in zip(workload.requests, bodies, strict=True)
        ]
        return await asyncio.gather(*tasks)


async def _one(  # noqa: PLR0917  what a request is made of
    session: aiohttp.ClientSession,
    target: Target,
    request: Request,
    body: dict[str, Any],
    start: float,
    gate: Gate | None,
    on_done: Callable[[Record], None],
) -> Record:
    record = Record(request.model, request.at_seconds, request.num_in, request.num_out)
    await asyncio.sleep(start + request.at_seconds - time.perf_counter())
    began = time.perf_counter()
    record.late_seconds = began - start - request.at_seconds
    if gate is not None:
        await gate.enter(request.model)
    try:
        await _stream(session, target, body, record, began)
        if record.num_tokens != request.num_out:
            record.error = f"{record.num_tokens} of {request.num_out} tokens came"
    except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
        record.error = f"{type(error).__name__}: {error}"
    finally:
        if gate is not None:
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
            )
            for row in csv.DictReader(file)
        ]


class TakingTurns:
    """One model is awake at a time; the others' requests wait for their turn.

    A model that is awake keeps its turn while it has requests, until another one's has waited for
    `patience_seconds`; then no more of its own are let in, and it sleeps when the last has ended.

    Args:
        fall_asleep: Puts a model to sleep.
        wake_up: Wakes a model up.
        awake: The model that is awake at the start.
        patience_seconds: How long others wait for a model that always has something to do.
    """

    def __init__(
        self,
        fall_asleep: Callable[[int], Awaitable[None]],
        wake_up: Callable[[int], Awaitable[None]],
        *,
        awake: int = 0,
        patience_seconds: float = 5.0,
    ) -> None:
        self._fall_asleep = fall_asleep
        self._wake_up = wake_up
        self._awake = awake
        self._patience_seconds = patience_seconds
        self._num_inside = 0
        self._waiting: list[tuple[float, int]] = []
        self._is_turning = False
        self._changed = asyncio.Condition()
        self.num_turns = 0

    async def enter(self, model: int) -> None:
        """See `Gate`."""
        ticket = (time.perf_counter(), model)
        async with self._changed:
            self._waiting.append(ticket)
            while not self._may_enter(model):
                if self._may_turn():
                    await self._turn()
                else:
                    await self._wait()
            self._waiting.remove(ticket)
            self._num_inside += 1

    def leave(self, model: int) -> None:
        """See `Gate`."""
        del model
        self._num_inside -= 1
        asyncio.get_running_loop().create_task(self._tell())

    def _may_enter(self, model: int) -> bool:
        if self._is_turning or model != self._awake:
            return False
        others = [since for since, waiting in self._waiting if waiting != model]
        is_out_of_patience = (
            bool(others) and time.perf_counter() - min(others) > self._patience_seconds
        )
        return not is_out_of_patience

    def _may_turn(self) -> bool:
        others = any(waiting != self._awake for _, waiting in self._waiting)
        return others and not self._num_inside and not self._is_turning

    async def _turn(self) -> None:
        self._is_turning = True
        _, chosen = min(ticket for ticket in self._waiting if ticket[1] != self._awake)
        before = self._awake
        self._changed.release()
        try:
            await self._fall_asleep(before)
            await self._wake_up(chosen)
        finally:
            await self._changed.acquire()
            self._is_turning = False
        self._awake = chosen
        self.num_turns += 1
        self._changed.notify_all()

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), self._patience_seconds)
        except TimeoutError:
            return

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
