"""The two containers of docs/scaling.md: real engines in PID namespaces of their own, one ledger.

`unshare` stands in for `docker run`; everything but the model and its sizes is the document's.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from helpers.containers import SHM, WITH_PROC, Container, parse, why_not
from helpers.documents import ROOT, blocks
from helpers.waiting import await_that

from kvcached_core.units import MIB
from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.load import make_burst
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN, make_model
from kvcached_demo.harness.plan import Plan
from kvcached_demo.harness.server import Process, start_cold
from kvcached_demo.harness.servers import Servers

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=f"no namespaces: {why_not()}"),
]

POOL = 256 * MIB
FREED_SECONDS = 2.0
NUM_REQUESTS = 8
MOST_PROCESSES = 1_000  # that a container has had so far
LINES = "\n".join(line for block in blocks(ROOT / "docs" / "scaling.md") for line in block).replace(
    "\\\n", ""
)
COMMANDS = [" ".join(line.split()) for line in LINES.splitlines()]
CONTAINERS = [parse(command) for command in COMMANDS if command.startswith("docker run ")]
(LISTING,) = (command for command in COMMANDS if command.startswith("kvcached list "))
CLI = "from kvcached_core.cli.app import main; main()"


class Both(Servers):
    """The document's containers, with the folder of this test in the place of the host's."""

    def __init__(self, workspace: Path) -> None:
        super().__init__(workspace, POOL)
        self.containers = {one.environ["KVCACHED_NAME"]: one for one in CONTAINERS}
        folder = str(CONTAINERS[0].source)
        (making,) = (command for command in COMMANDS if command.startswith("install "))
        assert folder in making
        words = making.replace(folder, str(self.directory)).split()
        subprocess.run(words, check=True)

    def begin(self, name: str, model: Path) -> None:
        self.start(
            VLLM, name, model, *VLLM.caching(is_on=True), *VLLM.running(16), launch=self.contain
        )

    def contain(
        self, found: Plan, command: list[str], environ: Mapping[str, str], log: Path
    ) -> Process:
        """Start an engine with the variables of its container, in that."""
        container = self.containers[found.name]
        variables = {name: value for name, value in environ.items() if name not in OURS}
        words = container.command(command, self.directory)
        return start_cold(found, words, variables | container.environ, log)

    def burst(self, name: str) -> list[str | None]:
        num_tokens = int(POOL * 0.7 / KV_BYTES_PER_TOKEN / NUM_REQUESTS)
        burst = make_burst(
            num_requests=NUM_REQUESTS,
            num_prompt_tokens=num_tokens - 16,
            num_output_tokens=16,
            seed=len(name),
        )
        return [answer.error for answer in asyncio.run(self[name].send(burst))]


OURS = ("ENABLE_KVCACHED", "KVCACHED_DIR", "KVCACHED_NAME")  # what the document has to say


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp("containers")
    with Both(folder) as both:
        for number, name in enumerate(both.containers, 1):
            both.begin(name, make_model(folder / name, seed=number))
        both.wait_ready()
        yield both


def named(container: Container) -> str:
    return container.environ["KVCACHED_NAME"]


def test_the_document_gives_both_one_folder_and_names_and_ports_of_their_own() -> None:
    first, second = CONTAINERS
    assert first.source == second.source
    assert first.environ["KVCACHED_DIR"] == str(SHM / first.target)
    assert named(first) != named(second)
    for one in CONTAINERS:
        assert one.environ["ENABLE_KVCACHED"] == "1"
        assert one.words[:2] == ("vllm", "serve")
        assert one.words[-2:] == ("--port", str(one.port))
    assert first.port != second.port


@pytest.mark.every_release  # under `make test` the ledger's, in tests/core/test_namespaces.py
def test_the_documents_listing_shows_both(both: Both) -> None:
    command = LISTING.replace(str(CONTAINERS[0].source), str(both.directory)).split()[1:]
    done = subprocess.run(
        [*WITH_PROC, sys.executable, "-c", CLI, *command, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    (device,) = json.loads(done.stdout)["devices"]
    assert sorted(row["name"] for row in device["instances"]) == sorted(both.containers)
    assert all(row["pid"] < MOST_PROCESSES for row in device["instances"]), "the container's own"


@pytest.mark.every_release  # and two servers' of one namespace, in test_servers.py
def test_memory_moves_between_them_and_a_killed_one_gives_all_of_it_back(both: Both) -> None:
    first, second = both.containers
    for name in (first, second, first, second):  # each needs most of the pool
        assert both.burst(name) == [None] * NUM_REQUESTS
    before = both.resident_bytes(second)
    assert before > POOL // 2
    killed_at = time.monotonic()
    both[second].kill()
    await_that(lambda: both.device().free_bytes + both.resident_bytes(first) == POOL, FREED_SECONDS)
    assert [row.name for row in both.device().instances] == [first]
    assert time.monotonic() - killed_at < FREED_SECONDS
    assert both.burst(first) == [None] * NUM_REQUESTS
