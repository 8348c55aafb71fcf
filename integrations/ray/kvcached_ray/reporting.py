"""What a node tells the cluster: what changes at once, and all that counts each second."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Protocol

from kvcached_gateway.admin.views import DeviceRow, ModelRow
from kvcached_gateway.control.moves import Scene
from kvcached_gateway.http.front import Front
from kvcached_gateway.http.worker_leases import rules_of
from kvcached_gateway.state import State
from kvcached_ray.report import Place, Report, Rules

__all__ = ["REPORT_SECONDS", "Reporter"]

REPORT_SECONDS = 1.0  # what changes a state is told at once

_log = logging.getLogger("ray.serve")


class Shown(Protocol):
    """What a gateway shows of itself, as `steering.Gateway` does."""

    @property
    def is_draining(self) -> bool:
        """Whether it takes no new requests."""

    def models_in_use(self) -> Sequence[ModelRow]:
        """Return its models that are not cold, or that are waited for."""

    def devices(self) -> Sequence[DeviceRow]:
        """Return its devices."""


class Seeing(Protocol):
    """What sees a machine, as `controller.Controller` does."""

    @property
    def machine(self) -> object | None:
        """What was seen; None before the first look."""

    def scene(self, *, is_whole: bool) -> Scene:
        """Return what placement sees."""


class Reporter:
    """Reports of one node.

    Args:
        place: The node.
        gateway: Its gateway.
        controller: What decides there.
        front: What requests are answered with there, for the rules that hold.
        send: Tells the cluster; it answers whether that was enough.

    Attributes:
        news: Set when there is something to be told at once.
    """

    def __init__(
        self,
        place: Place,
        gateway: Shown,
        controller: Seeing,
        front: Front,
        send: Callable[[Report], Awaitable[bool]],
    ) -> None:
        self._place = place
        self._gateway = gateway
        self._controller = controller
        self._front = front
        self._send = send
        self._dumped: tuple[object, object, Rules] | None = None
        self._told: Rules | None = None
        self.news = asyncio.Event()

    def changed(self, model: object, before: State, after: State, reason: str) -> None:
        """Take notice of a model's transition, as `model.Changed`.

        Whether somebody asks it is told with the rest: each request would be two reports.
        """
        del model, reason
        if {before, after} != {State.WARM, State.BUSY}:
            self.news.set()

    async def report(self) -> bool:
        """Tell the cluster how this node is; say whether it could be told."""
        rules = self._rules()
        has_looked = self._controller.machine is not None
        try:
            if not await self._send(self._said(rules)):
                self._told = None
                await self._send(self._said(rules))
        except Exception:  # noqa: BLE001  whatever becomes of the cluster, the node serves on
            self._told = None
            _log.warning("the cluster could not be told how this node is", exc_info=True)
            return False
        # Before the first look nothing is known of the models that have no place.
        self._told = rules if has_looked else None
        return True

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_SECONDS):
                    await self.news.wait()
            self.news.clear()
            if not await self.report():
                await asyncio.sleep(REPORT_SECONDS)

    def _rules(self) -> Rules:
        """Return what holds now; to write it as JSON takes long where there are many models."""
        settings, keys = self._front.settings(), self._front.keys()
        known = self._dumped
        if known is None or known[0] is not settings or known[1] is not keys:
            rules = rules_of(self._front)
            known = self._dumped = settings, keys, Rules(rules.settings, rules.keys)
        return known[2]

    def _said(self, rules: Rules) -> Report:
        is_new = rules is not self._told
        return Report(
            self._place,
            self._gateway.is_draining,
            tuple(self._gateway.models_in_use()),
            tuple(self._gateway.devices()),
            self._controller.scene(is_whole=is_new),
            rules if is_new else None,
        )
