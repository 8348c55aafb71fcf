"""What steers the whole cluster: the gateway's commands, passed on to the nodes they are for."""

import asyncio
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp

from kvcached_core.errors import ConfigError
from kvcached_gateway.admin.events import Events
from kvcached_gateway.admin.views import About, Decision, DeviceRow, ModelRow
from kvcached_gateway.control.decisions import Decisions
from kvcached_gateway.errors import RefusedVerbError
from kvcached_gateway.settings.config import Settings
from kvcached_gateway.state import PASSING
from kvcached_ray.inside import TOKEN
from kvcached_ray.members import Members
from kvcached_ray.models_file import ModelsFile
from kvcached_ray.report import Place, Standing
from kvcached_ray.views import device_rows, model_rows

__all__ = ["ClusterSteering"]

OK = 200
SETTLE_SECONDS = 0.2  # nodes tell what changed about as soon
LIMIT = aiohttp.ClientTimeout(total=60.0)


class ClusterSteering:
    """All gateways of the cluster as one: an `admin.Steering`.

    Args:
        members: The nodes.
        settings: What the file says; None before the first node told.
        decisions: Where cold models were sent, and why.
        send: Sends a cold model to a node; returns its id, or nothing where there is none.
        session: What nodes are asked with.
        file: The file of models.

    Attributes:
        events: What was decided here; what happens on a node its own socket tells.
    """

    def __init__(
        self,
        members: Members,
        settings: Callable[[], Settings | None],
        decisions: Decisions,
        send: Callable[[str], str],
        session: aiohttp.ClientSession,
        file: ModelsFile,
    ) -> None:
        self._members = members
        self._settings = settings
        self._decisions = decisions
        self._send = send
        self._session = session
        self._file = file
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()
        self.events = Events()

    def about(self) -> About:
        """See `Steering.about`."""
        settings = self._settings()
        file = "" if settings is None else str(settings.path)
        names = ", ".join(place.name for place in self._members)
        return About(file, f"nodes {names}", os.getpid(), self._clock() - self._began)

    def models(self) -> Sequence[ModelRow]:
        """See `Steering.models`."""
        settings = self._settings()
        return [] if settings is None else model_rows(settings, self._nodes())

    def devices(self) -> Sequence[DeviceRow]:
        """See `Steering.devices`."""
        return device_rows(self._nodes())

    def decisions(self) -> Sequence[Decision]:
        """See `Steering.decisions`: to which node each model was sent."""
        return list(self._decisions)

    async def explain(self, model_id: str) -> str:
        """See `Steering.explain`: what the cluster decided, and what each node says that has it."""
        lines = [f"{one.verb}: {one.reason}" for one in self._decisions.of(model_id)]
        there = self._there(model_id)
        if not there:
            lines.insert(0, f"{model_id} is cold on every node")
        path = f"/admin/explain/{quote(model_id, safe='')}"
        for place, told in zip(there, await self._all_told(there, path, "GET"), strict=True):
            lines += [f"on {place.name}:", *(f"  {line}" for line in told.text.splitlines())]
        return "\n".join(lines)

    async def steer(self, model_id: str, verb: str) -> str:
        """See `Steering.steer`; pins hold on every node, all else where the model is."""
        settings = self._settings()
        known = None if settings is None else settings.models.get(model_id)
        places = self._there(model_id)
        if verb in {"pin", "unpin"} or (known is not None and known.is_remote):
            places = list(self._members)
        elif verb == "warm" and not places and known is not None:
            chosen = self._members.find(self._send(known.adapter_of or model_id))
            places = [] if chosen is None else [chosen]
        if not places:
            raise RefusedVerbError(f"{model_id!r} is on no node, so there is nothing to {verb}")
        path = f"/admin/models/{quote(model_id, safe='')}/{verb}"
        told = await self._all_told(places, path)
        text = "\n".join(map(str, told))
        if not any(one.is_done for one in told):
            raise RefusedVerbError(text)
        return text

    async def settled(self, model_id: str) -> None:
        """See `Steering.settled`."""
        await asyncio.sleep(SETTLE_SECONDS)
        while any(self._is_passing(node, model_id) for node in self._nodes()):  # noqa: ASYNC110
            await asyncio.sleep(SETTLE_SECONDS)  # nodes report about as often

    async def reload(self) -> str:
        """See `Steering.reload`: the file of the head node is read, and each node goes by it.

        Raises:
            ConfigError: If it cannot be read, or a node refuses it; nodes that took it keep it.
        """
        self._file.read()
        told = await self._all_told(list(self._members), "/admin/reload")
        self._file.settle(is_taken=all(one.is_done for one in told))
        text = "\n".join(map(str, told))
        if not all(one.is_done for one in told):
            raise ConfigError(text)
        return text

    def drain(self) -> None:
        """Refuse: Serve ends what Serve started.

        Raises:
            RefusedVerbError: Always.
        """
        raise RefusedVerbError("the cluster is ended by `serve shutdown`, or by deleting the app")

    def _nodes(self) -> tuple[Standing, ...]:
        return self._members.table().nodes

    def _there(self, model_id: str) -> list[Place]:
        return [node.place for node in self._nodes() if model_id in node.models]

    def _is_passing(self, node: Standing, model_id: str) -> bool:
        row = node.models.get(model_id)
        return row is not None and (row.state in PASSING or bool(row.num_waiting))

    async def _all_told(
        self, places: Iterable[Place], path: str, method: str = "POST"
    ) -> list["_Told"]:
        return await asyncio.gather(*(self._tell(place, method, path) for place in places))

    async def _tell(self, place: Place, method: str, path: str) -> "_Told":
        """Return what a node answers, or why it does not: the others' answers still count."""
        try:
            async with self._session.request(
                method, place.admin_url + path, headers={TOKEN: place.token}, timeout=LIMIT
            ) as answer:
                found: Any = await answer.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            why = str(error) or type(error).__name__
            return _Told(place.name, f"it does not answer: {why}", is_done=False)
        is_done = answer.status == OK
        text = found["text"] if is_done else found.get("error", found)
        return _Told(place.name, str(text), is_done=is_done)


@dataclass(frozen=True)
class _Told:
    """What a node answered."""

    name: str
    text: str
    is_done: bool

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"
