"""Three models behind one URL: all at once, then one after the other."""

import asyncio
from pathlib import Path

from openai import AsyncOpenAI

from kvcached_demo.harness.way import Gateway, run

MODELS = ("small", "code", "chat")


async def ask(client: AsyncOpenAI, model: str) -> str:
    """Ask one model; return a line that says what it took."""
    answer = await client.chat.completions.with_raw_response.create(
        model=model, max_tokens=16, messages=[{"role": "user", "content": "Which model is this?"}]
    )
    usage = answer.parse().usage
    start, waited = answer.headers["x-kvcached-cold-start"], answer.headers["x-kvcached-queue-ms"]
    num_tokens = usage.completion_tokens if usage else 0
    return f"{model:8} {num_tokens:3} tokens, waited {waited} ms (had to begin with: {start})"


async def main(gateway: Gateway) -> None:
    """Ask all models at the same time, while none runs yet, and then each in turn."""
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=600) as client:
        print("all at once:")
        print(*await asyncio.gather(*(ask(client, model) for model in MODELS)), sep="\n")
        print("one after the other:")
        for model in MODELS:
            print(await ask(client, model))


def show(gateway: Gateway) -> None:
    """Show this way."""
    asyncio.run(main(gateway))


if __name__ == "__main__":
    raise SystemExit(run(show, Path(__file__).parent))
