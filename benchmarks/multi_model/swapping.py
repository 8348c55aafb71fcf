"""One server at a time: ended for another model's, which is started in its place."""

import asyncio
import contextlib
import signal
import subprocess
from typing import Any

from multi_model.client import Target
from multi_model.fleet import Fleet, dialect_of
from multi_model.turns import FirstComeFirstServed
from parts.vllm_servers import READY_SECONDS

# llama-swap's defaults: requests that a model takes at a time, and how long one has to end.
LIMIT = 10
END_SECONDS = 5.0


class SwappingFleet(Fleet):
    """The servers of which one runs; what that one listens on is new each time.

    Args:
        limit: How many requests a model takes at a time.
        words: What a fleet is made of.
    """

    def __init__(self, *words: Any, limit: int = LIMIT) -> None:
        super().__init__(*words)
        self._limit = limit
        self._live = [Target("", member.name, dialect_of(member)) for member in self.members]
        self._running_model = 0

    @property
    def targets(self) -> list[Target]:
        """Where each model is served, or was; the same list all the time."""
        return self._live

    def gate(self) -> FirstComeFirstServed:
        """Return the gate at which models are swapped in."""

        async def swap(model: int) -> None:
            await asyncio.to_thread(self.swap, model)

        return FirstComeFirstServed(swap, running=self._running_model, limit=self._limit)

    def swap(self, model: int) -> None:
        """End the server that runs, and start another model's.

        Raises:
            ServerError: If that one ends or takes too long.
        """
        server = self._running[self.names[self._running_model]]
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(END_SECONDS)
        server.kill()
        self._start(model)

    def num_preemptions(self) -> list[int | None]:
        """Return nothing: a server that has ended does not say it."""
        return [None] * len(self.members)

    def _start_all(self) -> None:
        """Start each model once, the first one last, and ask it, as other modes do.

        What the first start of a model compiles is on the disk then, as it is of one in use.
        """
        last, *others = range(len(self.members))
        for place, model in enumerate([*others, last]):
            if place:
                self.swap(model)
            else:
                self._start(model)
            self.warm_up(model)

    def _start(self, model: int) -> None:
        self._running_model = model
        member = self.members[model]
        server = self.follow(model)
        self._live[model] = Target(server.url, member.name, self._live[model].dialect)
        self._running.wait_ready(member.name, seconds=READY_SECONDS)

    def _resident_bytes(self) -> list[int]:
        return [
            member.kv_bytes or 0 if number == self._running_model else 0
            for number, member in enumerate(self.members)
        ]
