"""Loading two models of one GPU until one of them moves to another."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from parts.gateway_client import Answer
from parts.gateway_schedule import Due

from kvcached_gateway.admin.client import Client

MOVE_SECONDS, ROUND_SECONDS = 120.0, 5.0
MOVE_RATE = 6.0  # requests a second at each of two models
NUM_ROUNDS_AFTER = 2


def move(
    client: Client,
    send: Callable[[Sequence[Due]], list[Answer]],
    prompts: Sequence[tuple[int, ...]],
    num_tokens: int,
) -> dict[str, Any]:
    """Load two models that share a GPU until one has moved, and return what was seen.

    Args:
        client: What says where models are.
        send: Sends requests and returns what became of them.
        prompts: What is asked, in turn.
        num_tokens: What each asks for.
    """
    before = _places(client)
    here = Counter(before.values()).most_common(1)[0][0]
    pair = [name for name, place in before.items() if place == here][:2]
    answers: list[Answer] = []
    begin, after, rounds = time.monotonic(), before, 0
    while time.monotonic() - begin < MOVE_SECONDS and rounds < NUM_ROUNDS_AFTER:
        answers += send(
            [
                Due(number / MOVE_RATE, name, prompts[number % len(prompts)], num_tokens)
                for number in range(int(ROUND_SECONDS * MOVE_RATE))
                for name in pair
            ]
        )
        after = _places(client)
        rounds += after != before
    return {
        "pair": pair,
        "before": before,
        "after": after,
        "moved": sum(after[name] != before[name] for name in before),
        "seconds": time.monotonic() - begin,
        "requests": len(answers),
        "failed": sum(bool(answer.error) for answer in answers),
        "ttft_seconds": sorted(answer.ttft_seconds or 0.0 for answer in answers),
    }


def _places(client: Client) -> dict[str, str]:
    return {row.id: ",".join(row.devices) for row in client.models()}
