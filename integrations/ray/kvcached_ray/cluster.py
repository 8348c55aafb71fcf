"""The cluster's memory as a Serve deployment: nodes report to it, doors follow and ask it."""

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import aiohttp

from kvcached_gateway.control.decisions import Decisions
from kvcached_gateway.engines.state_file import Folder
from kvcached_gateway.listening import listen_for_admin
from kvcached_gateway.settings.config import Settings
from kvcached_ray.members import Members
from kvcached_ray.models_file import ModelsFile
from kvcached_ray.ranking import eligible, ranked
from kvcached_ray.report import Report, Rules, Table
from kvcached_ray.steering import ClusterSteering
from kvcached_ray.variables import own_directory

__all__ = ["FOLDER", "Cluster"]

FOLDER = "cluster"  # in KVCACHED_DIR of the head node: `kvcached models --dir KVCACHED_DIR/cluster`
FIRST_SECONDS = 2.5  # every node has reported by then
LOOK_SECONDS = 0.5
LEAST_SECONDS = 0.02  # between two tables that a door gets
PATIENCE_SECONDS = 10.0  # a door that got no table for so long asks again

_log = logging.getLogger("ray.serve")


class Cluster:
    """What the nodes said last, for doors and for the gateway's commands.

    Serve keeps one of it, on the head node. Where it ends another one starts, and knows all again
    when each node has reported once.

    Args:
        path: The file of models.
        text: What is in it.
    """

    def __init__(self, path: str, text: str) -> None:
        self._file = ModelsFile(Path(path), text)
        self._members = Members(time.monotonic, time.time_ns())
        self._decisions = Decisions(time.time)
        self._stack = AsyncExitStack()
        self._news = asyncio.Event()
        self._version = -1
        self._read: tuple[Rules, Settings] | None = None
        self._began = False
        self._knows_all = asyncio.Event()

    async def reconfigure(self, config: Mapping[str, object]) -> None:
        """Begin to look and to listen; Serve calls it once before the first question."""
        del config
        if self._began:
            return
        self._began = True
        directory = own_directory() / FOLDER
        self._stack.enter_context(Folder(directory))
        session = await self._stack.enter_async_context(aiohttp.ClientSession())
        steering = ClusterSteering(
            self._members, self._settings, self._decisions, self._send, session, self._file
        )
        await listen_for_admin(self._stack, steering, directory)
        self._stack.callback(asyncio.ensure_future(self._look()).cancel)

    async def models(self, *, is_new: bool) -> str:
        """Return the text of the file of models: the one that holds, or the one that shall."""
        return self._file.new if is_new else self._file.text

    async def report(self, report: Report) -> bool:
        """Take what a node says; answer whether it is to say all of it again."""
        is_enough = self._members.reported(report)
        self._tell()
        return is_enough

    async def gone(self, node: str, joined: int) -> None:
        """Give a node up that did not answer a door."""
        place = self._members.find(node)
        if self._members.gone(node, joined) and place is not None:
            _log.warning("node %s does not answer, and is given up", place.name)
        self._tell()

    async def table(self, version: int) -> Table | None:
        """Return what doors go by when that differs from a version; None where it stays."""
        await self._knows_all.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_SECONDS):
                while self._members.version == version:
                    await self._news.wait()
                await asyncio.sleep(LEAST_SECONDS)  # what changes together goes out together
        return None if self._members.version == version else self._members.table()

    async def send(self, model_id: str, avoided: frozenset[tuple[str, int]]) -> str:
        """Return the node that a model is on by now, or goes to; nothing where there is none."""
        await self._knows_all.wait()
        return self._send(model_id, avoided)

    def _send(self, model_id: str, avoided: frozenset[tuple[str, int]] = frozenset()) -> str:
        settings = self._settings()
        model = None if settings is None else settings.models.get(model_id)
        if settings is None or model is None:
            return ""
        nodes = eligible(model.nodes, self._members.table().nodes, avoided)
        up = ranked(model_id, nodes, lambda _node: 0)
        if up:
            return up[0].place.id
        choice = self._members.send(model_id, model.nodes, settings.placement, avoided)
        if choice is None:
            self._decisions.add(model_id, "wait", "there is no node that it may be on")
            return ""
        place = self._members.find(choice.node)
        name = choice.node if place is None else place.name
        self._decisions.add(model_id, "start", f"on {name}: {choice.reason}")
        return choice.node

    async def __del__(self) -> None:
        """End it; Serve awaits this."""
        await self._stack.aclose()

    def _settings(self) -> Settings | None:
        rules = self._members.table().rules
        if rules is None:
            return None
        if self._read is None or self._read[0] is not rules:
            self._read = rules, Settings.model_validate_json(rules.settings)
        return self._read[1]

    async def _look(self) -> None:
        # A node that has not reported yet would be taken for one that is not there.
        await asyncio.sleep(FIRST_SECONDS)
        self._knows_all.set()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for name in self._members.forget_silent():
                _log.warning("node %s says nothing any more, and is given up", name)
            self._tell()

    def _tell(self) -> None:
        """Let doors know, where there is something new."""
        if self._version != self._members.version:
            self._version = self._members.version
            news, self._news = self._news, asyncio.Event()
            news.set()
