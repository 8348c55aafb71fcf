"""Real engines behind a gateway, and host memory for a third of their weights: a disk has the rest.

Six tiny models for thirty of a gigabyte, on two cores. It takes minutes: for a release.
"""

import asyncio
import mmap
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from helpers import gateway_served
from helpers.gateway_life import short_folder
from helpers.gateway_served import PAGE, House, client
from helpers.waiting import await_that

from kvcached_core.weights.moves import read_moves

pytestmark = [
    *(pytest.mark.slow, pytest.mark.vllm, pytest.mark.every_release),
]

NAMES = "abcdef"
NUM_WEIGHTS, NUM_REQUEST = 6, 5  # pages of a model
NUM_HELD = len(NAMES) // 3
# Each keeps a page for the block that is nobody's; two may serve at a time.
NUM_PAGES = len(NAMES) + 2 * (NUM_WEIGHTS + NUM_REQUEST)
NUM_ASKS, NUM_AT_ONCE = 60, 2
BACK = re.compile(r"kvcached: \S+ came back from the disk in ([\d.]+) s")


@dataclass(frozen=True)
class Answer:
    """What one request was answered."""

    model: str
    status: int
    text: str
    seconds: float


async def _ask(session: aiohttp.ClientSession, url: str, model: str) -> Answer:
    begin = time.monotonic()
    asked = {"model": model, "prompt": "page by page", "max_tokens": 8, "temperature": 0}
    async with session.post(f"{url}/v1/completions", json=asked) as answer:
        body = await answer.json()
        text = body["choices"][0]["text"] if answer.status == 200 else str(body)
    return Answer(model, answer.status, text, time.monotonic() - begin)


def ask(url: str, models: Sequence[str]) -> list[Answer]:
    """Ask models in turn, two at a time."""

    async def main() -> list[Answer]:
        places = asyncio.Semaphore(NUM_AT_ONCE)
        async with client() as session:

            async def one(model: str) -> Answer:
                async with places:
                    return await _ask(session, url, model)

            return list(await asyncio.gather(*map(one, models)))

    return asyncio.run(main())


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    with short_folder() as path:
        settings = {
            "KVCACHED_HOST_POOL": NUM_PAGES * PAGE,
            "KVCACHED_HOST_BUDGET": NUM_HELD * NUM_WEIGHTS * PAGE,
            "KVCACHED_WEIGHTS_DISK": path / "disk",
            "KVCACHED_WEIGHTS_DISK_FREE": 0,
        }
        for name, value in settings.items():
            monkeypatch.setitem(gateway_served.ENVIRON_OF_ALL, name, str(value))
        made = House(path, NAMES, "")
        yield made
        made.close()


def plain_seconds(image: Path) -> float:
    """Return what it takes to read a file beside the page cache, page by page."""
    fd = os.open(image, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PAGE) as room:
            room.write(bytes(PAGE))  # it is there before the clock runs
            begin = time.monotonic()
            for offset in range(0, image.stat().st_size, PAGE):
                os.preadv(fd, [room], offset)
            return time.monotonic() - begin
    finally:
        os.close(fd)


def test_models_that_host_memory_has_no_room_for_answer_at_random_and_come_back_from_the_disk(
    house: House,
) -> None:
    disk = house.path / "disk"
    with house.inside() as gateway:
        first = ask(gateway.url, NAMES)
        assert {one.status for one in first} == {200}, first
        right = {one.model: one.text for one in first}
        assert len(set(right.values())) > 1  # so that another model's weights would be seen
        # What the budget has no room for is there by the time that all have had a copy.
        await_that(lambda: len(list(disk.glob("*.image"))) >= len(NAMES) - NUM_HELD)
        before, chance = read_moves(disk), random.Random(1)
        answers = ask(gateway.url, [chance.choice(NAMES) for _ in range(NUM_ASKS)])
        moves = read_moves(disk)
        logs = [Path(gateway.here.fleet.log_of(model)) for model in gateway.here.fleet.all]
        back = [float(found) for log in logs for found in BACK.findall(log.read_text())]
        plain = [plain_seconds(image) for image in disk.glob("*.image")]
    waited = sorted(one.seconds for one in answers)
    num_read, read_seconds = moves.num_read - before.num_read, moves.read_seconds
    print(f"{moves}, {num_read} of them for {NUM_ASKS} asks; from the log {back}; plain {plain}")
    print(f"answers after {waited[len(waited) // 2]:.2f} s, {waited[-1]:.2f} s at most")
    assert [one for one in answers if one.status != 200 or one.text != right[one.model]] == []
    assert num_read >= NUM_ASKS // 4, "it was never asked for what lay on the disk"
    assert moves.num_spoiled == 0
    # Every engine's log says so: vLLM shows lines of its own loggers alone.
    assert len(back) == moves.num_read
    assert sum(back) == pytest.approx(read_seconds, abs=0.01 * len(back))
