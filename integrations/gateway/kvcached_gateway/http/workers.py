"""The processes of `workers: N`: started, told what holds, started again when they end."""

import asyncio
import logging
import socket
import sys
from dataclasses import dataclass

from kvcached_gateway.http.front import Front
from kvcached_gateway.http.worker import LAST_SECONDS
from kvcached_gateway.http.worker_leases import WorkerLeases, rules_of

__all__ = ["Workers"]

logger = logging.getLogger(__name__)
RESTART_SECONDS = 1.0  # between two starts of one worker
LOOK_SECONDS = 1.0  # keys follow their file as often, and nobody tells
END_SECONDS = 3 * LAST_SECONDS


@dataclass
class _Worker:
    """One process, and our end of its socket."""

    process: asyncio.subprocess.Process
    leases: WorkerLeases


class Workers:
    """Workers that all listen on one port.

    Args:
        front: What they serve; its leases, keys and observer stay in this process.
        host: The address to listen on.
        port: The port, or 0 for any that is free.
        num: How many.

    Attributes:
        port: The port.
    """

    def __init__(self, front: Front, host: str, port: int, num: int) -> None:
        self._front = front
        self._host = host
        self._num = num
        self._workers: dict[int, _Worker] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._told: tuple[object, object, bool] | None = None
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # It keeps the port for them, also while none of them runs; it never listens.
        self._holder = socket.socket(family, socket.SOCK_STREAM)
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._holder.bind((host, port))
        self.port: int = self._holder.getsockname()[1]

    @property
    def pids(self) -> list[int]:
        """The processes, in the order of their seats."""
        return [worker.process.pid for _, worker in sorted(self._workers.items())]

    @property
    def num_leases(self) -> int:
        """How many leases they hold."""
        return sum(worker.leases.num_leases for worker in self._workers.values())

    def start(self) -> None:
        """Start them; a worker listens when it has imported what it needs."""
        self._tasks = [asyncio.create_task(self._keep(seat)) for seat in range(self._num)]
        self._tasks.append(asyncio.create_task(self._follow()))

    def changed(self) -> None:
        """Tell them what holds now; each later request of theirs goes by it."""
        rules = rules_of(self._front)
        self._told = self._now()
        for worker in self._workers.values():
            worker.leases.send(rules)

    async def stop(self) -> None:
        """End them, with whatever they still serve."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._holder.close()
        await asyncio.gather(*map(_end, self._workers.values()))
        self._workers.clear()

    def _now(self) -> tuple[object, object, bool]:
        return self._front.settings(), self._front.keys(), self._front.is_ready()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            told = self._told
            if told is None or any(a is not b for a, b in zip(told, self._now(), strict=True)):
                self.changed()

    async def _keep(self, seat: int) -> None:
        while True:
            try:
                worker = self._workers[seat] = await self._start_one()
            except OSError as error:  # too few processes, files or bytes, for now
                logger.warning("worker %d cannot be started, and is tried again: %s", seat, error)
            else:
                code = await worker.process.wait()
                logger.error(
                    "worker %d (process %d) ended with %d; another starts",
                    seat,
                    worker.process.pid,
                    code,
                )
                worker.leases.close()
            await asyncio.sleep(RESTART_SECONDS)

    async def _start_one(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-m", "kvcached_gateway.http.worker"),
                    *(str(theirs.fileno()), self._host, str(self.port)),
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,  # a terminal's interrupt is the controller's to handle
                )
            except BaseException:
                ours.close()
                raise
        _, leases = await asyncio.get_running_loop().create_connection(
            lambda: WorkerLeases(self._front), sock=ours
        )
        leases.send(rules_of(self._front))
        return _Worker(process, leases)


async def _end(worker: _Worker) -> None:
    """End a worker: it goes when its socket closes, or is killed."""
    worker.leases.close()
    try:
        await asyncio.wait_for(worker.process.wait(), END_SECONDS)
    except TimeoutError:
        worker.process.kill()
        await worker.process.wait()
