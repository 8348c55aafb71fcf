"""A node of Ray that dies, with all of its engines: what it had answers from the other one.

It ends the cluster that other tests share, so it runs behind them.
"""

import asyncio
import threading
from pathlib import Path

import aiohttp
import pytest
from helpers.containers import why_not
from helpers.gateway_engines import GREEDY
from helpers.gateway_served import UP_SECONDS, ask_in_turn, client, load
from helpers.ray_models import NUM_TOKENS
from helpers.ray_nodes import HEAD, OTHER, RayCluster
from helpers.waiting import await_that

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=f"no namespaces: {why_not()}"),
]

NUM_BEFORE = 30
LONG = GREEDY | {"prompt": "memory", "max_tokens": NUM_TOKENS - 100, "ignore_eos": True}


class Stream:
    """A long answer that a thread reads; its first event has come when this is there."""

    def __init__(self, url: str, model: str) -> None:
        self.lines: list[str] = []
        self.error: aiohttp.ClientError | None = None
        self._has_begun = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._read(url, model),))
        self._thread.start()
        assert self._has_begun.wait(UP_SECONDS)

    async def _read(self, url: str, model: str) -> None:
        body = LONG | {"model": model, "stream": True}
        try:
            async with (
                client() as session,
                session.post(f"{url}/v1/completions", json=body) as answer,
            ):
                async for line in answer.content:
                    self.lines.append(line.decode().strip())
                    self._has_begun.set()
        except aiohttp.ClientError as error:
            self.error = error
        self._has_begun.set()

    def read_to_its_end(self) -> str:
        self._thread.join(UP_SECONDS)
        return "\n".join(line for line in self.lines if line)


def contents(folder: Path) -> dict[str, bytes]:
    """Return what the files of a node's ledgers hold."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".log"
    }


def test_models_of_a_node_that_is_killed_answer_from_the_other_and_only_begun_answers_break(
    cluster: RayCluster,
) -> None:
    assert ask_in_turn(cluster.url, cluster.extent.bases).are_all_right  # all are up somewhere
    lost = [name for name, nodes in cluster.up().items() if nodes == {OTHER}]
    assert lost
    head = cluster.nodes[HEAD]
    before = {name: row.num_starts for name, row in head.rows().items()}
    with load(cluster.url, *cluster.extent.models, num_clients=6) as answers:
        await_that(lambda: answers.seen[200] >= NUM_BEFORE, UP_SECONDS)
        stream = Stream(cluster.url, lost[0])
        dead = cluster.kill(OTHER)
        left = contents(dead.directory)
        again = ask_in_turn(cluster.url, lost * 3, num_at_once=len(lost) * 3)
    assert again.seen == {200: 3 * len(lost)}, again.errors[:3]
    assert answers.are_all_right, (answers.seen, answers.errors[:3])
    assert answers.seen[200] > NUM_BEFORE
    text = stream.read_to_its_end()
    assert "[DONE]" not in text
    assert '"engine_died"' in text or stream.error is not None, text[-500:]
    after = {name: row.num_starts for name, row in head.rows().items()}
    new = {name: num - before[name] for name, num in after.items() if num != before[name]}
    assert new == dict.fromkeys(lost, 1), "each is started once, and nothing else is"
    assert "host.ledger" in left
    assert contents(dead.directory) == left, "nobody touches what a dead node had"
