"""A client of vLLM that reads an answer token by token, to its end or until it has enough."""

import json

import httpx

ANSWERED, BROKEN_OFF = "answered", "aborted"


async def ask(
    session: httpx.AsyncClient, model: str, prompt: list[int], num_out: int, num_read: int
) -> str:
    """Ask for so many tokens; return `ANSWERED`, or `BROKEN_OFF` if it hung up before the end.

    Raises:
        httpx.HTTPError: If the server cannot be reached.
        ValueError: If it refused, or the answer is too short.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": num_out, "stream": True}
    body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    num_tokens = 0
    async with session.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise ValueError(f"status {response.status_code}")
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data in {line, "[DONE]"}:
                continue
            for choice in json.loads(data).get("choices", []):
                num_tokens += len(choice.get("token_ids") or ())
            if num_tokens >= num_read < num_out:
                return BROKEN_OFF
    if num_tokens != num_out:
        raise ValueError(f"{num_tokens} of {num_out} tokens came")
    return ANSWERED
