"""Bursts of streaming completions, and what came back."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

FIRST_PLAIN_TOKEN = 3
VOCABULARY = 500


@dataclass
class Completion:
    """One request's answer.

    Attributes:
        token_ids: The tokens that came back.
        ttft_seconds: Time to the first of them, or None if none came.
        error: Why it failed, or None.
    """

    token_ids: list[int] = field(default_factory=list)
    ttft_seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Burst:
    """Requests that start together.

    Attributes:
        prompts: Token ids of each prompt.
        num_output_tokens: Tokens that each request asks for and gets.
    """

    prompts: tuple[tuple[int, ...], ...]
    num_output_tokens: int


def make_burst(
    *, num_requests: int, num_prompt_tokens: int, num_output_tokens: int, seed: int
) -> Burst:
    """Return random prompts of one length, the same for the same seed."""
    source = random.Random(seed)  # noqa: S311  prompts, not secrets
    prompts = tuple(
        tuple(source.randrange(FIRST_PLAIN_TOKEN, VOCABULARY) for _ in range(num_prompt_tokens))
        for _ in range(num_requests)
    )
    return Burst(prompts, num_output_tokens)


@dataclass(frozen=True)
class Dialect:
    """How an engine is asked for tokens, and where they are in its events.

    Attributes:
        path: Where requests are posted.
        body: Returns a request from the model's name, the prompt and the tokens wanted.
        new_tokens: Returns the tokens that an event brings, from it and from how many there are.
    """

    path: str
    body: Callable[[str, tuple[int, ...], int], dict[str, Any]]
    new_tokens: Callable[[dict[str, Any], int], list[int]]


def _vllm_body(model: str, prompt: tuple[int, ...], num_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": num_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


def _vllm_tokens(event: dict[str, Any], _num_before: int) -> list[int]:
    return event["choices"][0].get("token_ids") or []


def _sglang_body(_model: str, prompt: tuple[int, ...], num_tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0.0, "max_new_tokens": num_tokens, "ignore_eos": True}
    return {"input_ids": list(prompt), "sampling_params": sampling, "stream": True}


def _sglang_tokens(event: dict[str, Any], num_before: int) -> list[int]:
    if "error" in event:
        raise ValueError(event["error"].get("message", "the engine said nothing more"))
    ids: list[int] = event["output_ids"]
    return ids[num_before:]  # each event has all of them


VLLM = Dialect("/v1/completions", _vllm_body, _vllm_tokens)
SGLANG = Dialect("/generate", _sglang_body, _sglang_tokens)


async def send(url: str, model: str, burst: Burst, dialect: Dialect = VLLM) -> list[Completion]:
    """Send all requests of `burst` at once and wait for all answers; failures are answers too."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:  # noqa: S113  a queue may be long
        requests = (
            _complete(client, dialect, dialect.body(model, prompt, burst.num_output_tokens), burst)
            for prompt in burst.prompts
        )
        return await asyncio.gather(*requests)


def generate(
    url: str, prompts: list[list[int]], num_tokens: int, seconds: float = 240.0
) -> list[list[int]]:
    """Return SGLang's answers to prompts that come in one message: it schedules them together."""
    sampling = {"temperature": 0.0, "max_new_tokens": num_tokens, "ignore_eos": True}
    body = {"input_ids": prompts, "sampling_params": sampling}
    answer = httpx.post(f"{url}{SGLANG.path}", json=body, timeout=seconds)
    answer.raise_for_status()
    return [one["output_ids"] for one in answer.json()]


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """Yield what each event carries; only a line feed ends one, generated text may have others."""
    rest = b""
    async for received in response.aiter_bytes():
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data: ").strip()
            if line.startswith(b"data: ") and data != b"[DONE]":
                yield data.decode()


async def _complete(
    client: httpx.AsyncClient, dialect: Dialect, body: dict[str, Any], burst: Burst
) -> Completion:
    completion = Completion()
    start = time.perf_counter()
    try:
        async with client.stream("POST", dialect.path, json=body) as response:
            response.raise_for_status()
            async for data in _events(response):
                num_before = len(completion.token_ids)
                token_ids = dialect.new_tokens(json.loads(data), num_before)
                if token_ids and completion.ttft_seconds is None:
                    completion.ttft_seconds = time.perf_counter() - start
                completion.token_ids += token_ids
    except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
        completion.error = f"{type(error).__name__}: {error}"
    if completion.error is None and len(completion.token_ids) != burst.num_output_tokens:
        completion.error = f"{len(completion.token_ids)} of {burst.num_output_tokens} tokens came"
    return completion
