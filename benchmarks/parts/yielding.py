"""Servers that yield their weights, and what becomes of their requests."""

import argparse
import asyncio
import contextlib
import shlex
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from parts.giving import SLEEP_SECONDS, fall_asleep, wait_offered
from parts.neighbour import Neighbour
from parts.record import Record, begin_record, command_line
from parts.vllm_servers import READY_SECONDS
from parts.yielding_servers import YieldingServers

from kvcached_core.units import MIB
from kvcached_demo.harness.engines import ENGINES, SGLANG, VLLM
from kvcached_demo.harness.load import Completion, make_burst

NUM_PROMPT_TOKENS, NUM_TOKENS = 128, 8
FIRST, SECOND = "first", "second"  # the names of two servers
# Where an engine is told to forget its prefix cache.
FORGET = {VLLM.name: "/reset_prefix_cache", SGLANG.name: "/flush_cache"}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return what reads a command line; its own arguments are added to it."""
    parser = command_line(description, can_rehearse=True)
    parser.add_argument("--engine", choices=sorted(ENGINES), default=VLLM.name)
    parser.add_argument("--runner", type=int, choices=(1, 2), help="vLLM's model runner")
    parser.add_argument("--server-options", default="", help="more arguments of every server")
    return parser


AnyRun = TypeVar("AnyRun", bound="Run")


class Run(YieldingServers):
    """Servers, and what became of their requests; its arguments are those of its base."""

    def __init__(self, folder: Path, **words: Any) -> None:
        super().__init__(folder, **words)
        self.right: dict[tuple[str, int], list[int]] = {}
        self.num_failed = self.num_wrong = 0
        self.used_before_bytes = 0  # of the device, before the first server

    def close(self, record: Record) -> None:
        """End all servers, and say how many requests went wrong."""
        record.add(failed=self.num_failed, wrong=self.num_wrong)
        self.end(record.path)

    def ask(self, name: str, num_prompt_tokens: int = NUM_PROMPT_TOKENS) -> Completion:
        """Send one request and check its tokens against those of the first time.

        What a prefix cache has was computed in another batch, so it is emptied first.
        """
        if name in self.caching:
            self._forget(name)
        burst = make_burst(
            num_requests=1,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=NUM_TOKENS,
            seed=1,
        )
        (answer,) = asyncio.run(self.servers[name].send(burst))
        self.num_failed += answer.error is not None
        right = self.right.setdefault((name, num_prompt_tokens), answer.token_ids)
        self.num_wrong += right != answer.token_ids
        return answer

    def _forget(self, name: str) -> None:
        """Empty a server's prefix cache; SGLang refuses while a request runs, or is just ending."""
        deadline = time.monotonic() + SLEEP_SECONDS
        while not (answer := self.servers[name].post(FORGET[self.engine.name])).is_success:
            if time.monotonic() > deadline:
                answer.raise_for_status()
            time.sleep(0.01)

    def load(self, name: str, num: int, num_in: int, num_out: int, *, seed: int) -> None:
        """Send requests at once, and wait until each of them is answered or has failed."""
        burst = make_burst(
            num_requests=num, num_prompt_tokens=num_in, num_output_tokens=num_out, seed=seed
        )
        answers = asyncio.run(self.servers[name].send(burst))
        self.num_failed += sum(answer.error is not None for answer in answers)

    def first_token_seconds(self, name: str, num_prompt_tokens: int = NUM_PROMPT_TOKENS) -> float:
        """Send one request and return the time to its first token."""
        return self.ask(name, num_prompt_tokens).ttft_seconds or float("nan")

    def sleep(self, name: str) -> None:
        """Let a server yield all of its weights, once its last request is over."""
        fall_asleep(name, self.servers.directory)

    def wait_copied(self, *names: str) -> float:
        """Wait until those named have offered their weights: their host copies are complete."""
        return wait_offered(lambda: map(self.view, names), READY_SECONDS)

    def room_bytes(self) -> int:
        """Return what a newcomer could be promised without anybody giving anything."""
        with self.servers.open_ledger() as ledger:
            neighbour = Neighbour(ledger)
            try:
                return neighbour.room_bytes
            finally:
                neighbour.close()

    @contextlib.contextmanager
    def taken(self, num_bytes: int) -> Iterator[Neighbour]:
        """Let a row of this process be promised so many bytes for a while."""
        with self.servers.open_ledger() as ledger:
            neighbour = Neighbour(ledger)
            try:
                neighbour.take(num_bytes, 2 * MIB)
                yield neighbour
            finally:
                neighbour.close()


def seconds_after_sleeps(run: Run, num: int) -> list[float]:
    """Return the seconds to the first token of one request after each of `num` sleeps."""
    seconds = []
    for _ in range(num):
        run.sleep(FIRST)
        seconds.append(run.first_token_seconds(FIRST))
    return seconds


def first_tokens_after_sleeps(run: Run, num: int, *, num_awake: int) -> dict[str, list[float]]:
    """Ask the first server while it is awake, and then again after each of `num` sleeps.

    Returns:
        The seconds to the first token of each request.
    """
    awake = [run.first_token_seconds(FIRST) for _ in range(num_awake)]
    return {"awake_seconds": awake, "seconds": seconds_after_sleeps(run, num)}


@contextlib.contextmanager
def running(make: type[AnyRun], record: Record, **words: Any) -> Iterator[AnyRun]:
    """Yield a run in a folder of its own, made with these words; end all behind the block."""
    with tempfile.TemporaryDirectory(prefix="kv-", ignore_cleanup_errors=True) as folder:
        run = make(Path(folder), **words)
        try:
            yield run
        finally:
            run.close(record)


@contextlib.contextmanager
def recorded_run(options: argparse.Namespace, **facts: Any) -> Iterator[tuple[Run, Record]]:
    """Yield what a command line's servers run in, and the record of it; end all behind the block.

    Args:
        options: What `make_parser` has read.
        **facts: What the record says beside machine and engine.
    """
    engine, more = ENGINES[options.engine], shlex.split(options.server_options)
    record = begin_record(options)
    record.add(engine=f"{engine.title} {engine.release()}", server_options=more, **facts)
    words = {"engine": engine, "server_options": more}
    with running(Run, record, tiny=options.tiny, runner=options.runner, **words) as run:
        yield run, record
