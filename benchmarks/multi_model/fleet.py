"""The servers of one mode: started, sampled, stopped, and gone whatever happens."""

import asyncio
import contextlib
import csv
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from multi_model import client
from multi_model.ballast import Ballast
from multi_model.gpu import Gpu
from multi_model.modes import OFFLOAD, SHARED, SLEEP_SWAP, UPSTREAM, Member, Site
from multi_model.turns import TakingTurns
from multi_model.upstream import launch_with
from parts.tier_counts import host_counts
from parts.vllm_servers import PREEMPTIONS, READY_SECONDS

from kvcached_core.errors import LedgerError
from kvcached_demo.harness.engines import SGLANG
from kvcached_demo.harness.servers import Servers

if TYPE_CHECKING:
    from kvcached_demo.harness.server import EngineServer

SAMPLE_SECONDS = 0.25
# What every server is asked once before a schedule begins: its first answer is slow.
FIRST_PROMPT = (5, 6, 7)


def dialect_of(member: Member) -> client.Dialect:
    """Return how a server is asked."""
    return client.SGLANG if member.engine is SGLANG else client.OPENAI


@dataclass
class Samples:
    """What each instance held, sample by sample, in bytes; and what the device had in use."""

    names: list[str]
    seconds: list[float] = field(default_factory=list)
    resident_bytes: list[list[int]] = field(default_factory=list)
    device_bytes: list[int] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the samples as a table, a line each."""
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["seconds", *self.names, "device_bytes"])
            for row in zip(self.seconds, self.resident_bytes, self.device_bytes, strict=True):
                table.writerow([f"{row[0]:.2f}", *row[1], row[2]])

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return what `write` wrote."""
        with path.open(newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
        return cls(
            head[1:-1],
            [float(row[0]) for row in rows],
            [[int(cell) for cell in row[1:-1]] for row in rows],
            [int(row[-1]) for row in rows],
        )


class Fleet:
    """The servers of one mode.

    Args:
        mode: The mode's name.
        members: How each is started.
        site: Where.
        models: The folder of each model.
        folder: For logs and the ledger.
    """

    def __init__(
        self, mode: str, members: Sequence[Member], site: Site, models: Sequence[Path], folder: Path
    ) -> None:
        self.mode = mode
        self.members = members
        self.site = site
        self.folder = folder
        self.models = models
        self._running = Servers(folder)
        self._stack = contextlib.ExitStack()
        self._ballast: Ballast | None = None
        self._awake: list[int] = []

    def __enter__(self) -> Self:
        """Start all, and ask each once; stop those that were started if one does not answer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stack.enter_context(self._running)
        try:
            self._start_all()
            has_pool = self.site.pool_bytes is not None and not self.site.is_host
            if has_pool and self.mode in SHARED:
                self._ballast = Ballast(self._running.open_ledger(), self.site.pool_bytes)
                self._stack.callback(self._ballast.close)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop all."""
        self._stack.close()

    def _start_all(self) -> None:
        if self.mode == SLEEP_SWAP:
            self._start_asleep()
            return
        for number, member in enumerate(self.members):
            self.follow(number)
            if member.starts_alone:
                self._running.wait_ready(member.name, seconds=READY_SECONDS)
        self._running.wait_ready(seconds=READY_SECONDS)
        for number in range(len(self.members)):
            self.warm_up(number)

    def _start_asleep(self) -> None:
        """Start a few at a time, and put them to sleep: the next ones need their room to start."""
        num_starting = self.site.num_starting(self.members)
        for first in range(0, len(self.members), num_starting):
            numbers = range(first, min(first + num_starting, len(self.members)))
            for number in numbers:
                self.follow(number)
            names = [self.members[number].name for number in numbers]
            self._running.wait_ready(*names, seconds=READY_SECONDS)
            for number in numbers:
                self.warm_up(number)
                self.sleep(number)
        self._wake_up_all()

    def _wake_up_all(self) -> None:
        """Wake as many up as may be awake, of those that sleep the first ones."""
        sleepers = (number for number in range(len(self.members)) if number not in self._awake)
        num_missing = self.site.num_awake - len(self._awake)
        for number in list(itertools.islice(sleepers, num_missing)):
            self.wake_up(number)

    def follow(self, model: int) -> "EngineServer":
        """Start a model's server, in the place of an earlier one of its own."""
        member = self.members[model]
        launch = launch_with(member.python) if member.python else None
        return self._running.follow(member, self.models[model], launch=launch)

    def warm_up(self, model: int) -> None:
        """Ask a model's server for one token."""
        member = self.members[model]
        dialect = dialect_of(member)
        self._post(model, dialect.path, dialect.body(member.name, list(FIRST_PROMPT), 1))

    def gate(self) -> TakingTurns | None:
        """Return what requests pass first, or None where all models may be asked."""
        if self.mode != SLEEP_SWAP:
            return None

        self._wake_up_all()  # the last turn may have been cut off

        async def fall_asleep(model: int) -> None:
            await asyncio.to_thread(self.sleep, model)

        async def wake_up(model: int) -> None:
            await asyncio.to_thread(self.wake_up, model)

        return TakingTurns(fall_asleep, wake_up, awake=self._awake)

    def activations(self) -> tuple[int, float] | None:
        """Return how often weights came back so far, and the seconds; None where they never go."""
        return None

    @property
    def servers(self) -> "list[EngineServer]":
        """The servers in the order of the models."""
        return list(self._running.by_name.values())

    @property
    def names(self) -> list[str]:
        """The instances' names."""
        return [member.name for member in self.members]

    @property
    def targets(self) -> list[client.Target]:
        """Where each model is served."""
        return [
            client.Target(server.url, member.name, dialect_of(member))
            for server, member in zip(self.servers, self.members, strict=True)
        ]

    def share_out(self) -> None:
        """Leave the elastic engines of a GPU no more than the pool, whatever else has grown."""
        if self._ballast is not None:
            self._ballast.adjust()

    def sleep(self, model: int) -> None:
        """Put a vLLM server to sleep: its weights go to the host, its KV cache is gone."""
        if model in self._awake:
            self._awake.remove(model)
        self._post(model, "/sleep?level=1")

    def wake_up(self, model: int) -> None:
        """Wake it up."""
        self._post(model, "/wake_up")
        self._awake.append(model)

    def num_preemptions(self) -> list[int | None]:
        """Return how often each vLLM server has preempted a request so far."""
        return [
            None if member.engine is SGLANG else int(server.metric(PREEMPTIONS))
            for server, member in zip(self.servers, self.members, strict=True)
        ]

    def loaded_bytes(self) -> int | None:
        """Return what all host tiers gave back so far; None where there are none."""
        if self.mode != OFFLOAD:
            return None
        return sum(each.loaded_bytes for each in host_counts(self._running.directory).values())

    @contextlib.contextmanager
    def sampling(self) -> Iterator[Samples]:
        """Sample memory while the block runs."""
        samples = Samples(self.names)
        end = threading.Event()
        thread = threading.Thread(target=self._sample, args=(samples, end), daemon=True)
        thread.start()
        try:
            yield samples
        finally:
            end.set()
            thread.join()

    def _post(self, model: int, path: str, body: Any = None) -> None:
        server = self._running[self.members[model].name]
        server.post(path, body, READY_SECONDS).raise_for_status()

    def _sample(self, samples: Samples, end: threading.Event) -> None:
        gpu = None if self.site.is_host else Gpu()
        start = time.monotonic()
        while not end.wait(SAMPLE_SECONDS):
            samples.resident_bytes.append(self._resident_bytes())
            samples.device_bytes.append(gpu.used_bytes() if gpu else 0)
            samples.seconds.append(time.monotonic() - start)

    def _resident_bytes(self) -> list[int]:
        if self.mode == UPSTREAM:  # it has no ledger of ours: what the device has in use says it
            return [0] * len(self.members)
        if self.mode == SLEEP_SWAP:
            awake = set(self._awake)
            return [
                member.kv_bytes or 0 if number in awake else 0
                for number, member in enumerate(self.members)
            ]
        if self.mode not in SHARED:
            return [member.kv_bytes or 0 for member in self.members]
        try:
            views = {row.name: row.resident_bytes for row in self._running.device().instances}
        except LedgerError:
            views = {}
        return [views.get(name, 0) for name in self.names]
