"""A request's right to a node: the one that has its model, or the one that shall have it."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable

from kvcached_gateway.errors import RefusedError, model_not_found, past_deadline
from kvcached_gateway.http.access import CLASS, DEADLINE_MS
from kvcached_gateway.lease import Address, Ask, Ending, HowToClose, Woken
from kvcached_gateway.settings.config import ModelSettings, Settings
from kvcached_ray.inside import TOKEN
from kvcached_ray.ranking import eligible, ranked
from kvcached_ray.report import Standing, Table

__all__ = ["NodeLeases", "Send"]

RETRY_SECONDS = 0.5  # between two questions to a cluster that knows no node
RETRY_AFTER_SECONDS = 5.0

_log = logging.getLogger(__name__)
Avoided = frozenset[tuple[str, int]]
# Asks the cluster where a cold model goes; an empty id is nowhere.
Send = Callable[[str, Avoided], Awaitable[str]]
# Tells the cluster of a node that did not answer, with its `joined`.
Accuse = Callable[[str, int], Awaitable[None]]


class NodeLeases:
    """Leases of nodes; a `lease.Leases`.

    Args:
        settings: The settings that hold now.
        send: Asks the cluster where a cold model goes.
        accuse: Tells the cluster of a node that did not answer.
        home: The node of this door: where all are alike, it is the nearest.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        send: Send,
        accuse: Callable[[str, int], Awaitable[None]],
        home: str,
    ) -> None:
        self._settings = settings
        self._send = send
        self._accuse = accuse
        self._home = home
        self._table = Table()
        self._news = asyncio.Event()
        self._avoided: set[tuple[str, int]] = set()
        self._num_own: Counter[tuple[str, str]] = Counter()
        self._telling: set[asyncio.Future[None]] = set()

    def follow(self, table: Table) -> None:
        """Go by another table."""
        self._table = table
        self._avoided &= {(node.place.id, node.joined) for node in table.nodes}
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def take(self, ask: Ask) -> "NodeLease":
        """Return the right to a node, as `Leases` says; it waits while there is no node.

        Raises:
            RefusedError: If there is no such model (404), or no node for so long as its requests
                wait (503), or its client does (504).
        """
        named = self._settings().resolve(ask.model)
        if named is None:
            raise model_not_found(ask.model)
        model = self._settings().models[named.adapter_of or named.id]
        clock = asyncio.get_running_loop().time
        began = clock()
        seconds, is_own = ask.patience(model.max_wait_seconds)
        try:
            async with asyncio.timeout(seconds):
                while (node := await self._node(model)) is None:
                    await self._wait()
        except TimeoutError:
            if is_own:
                raise past_deadline(named.id) from None
            raise RefusedError(
                503,
                "no_node",
                f"no node of the cluster took model {named.id!r} within {seconds:g} s",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            ) from None
        waited_seconds = clock() - began
        return NodeLease(self, node, named.id, model.id, ask.later(waited_seconds), waited_seconds)

    def num_own(self, node: str, model_id: str) -> int:
        """Return how many requests of this door a node has for a model."""
        return self._num_own[node, model_id]

    def began(self, node: str, model_id: str) -> None:
        """Count a request."""
        self._num_own[node, model_id] += 1

    def ended(self, node: Standing, model_id: str, ending: Ending) -> None:
        """Count it no more; a node that did not answer is asked no more until it says something."""
        known = node.place.id, model_id
        self._num_own[known] -= 1
        if not self._num_own[known]:
            del self._num_own[known]
        if ending is Ending.DIED_BEFORE:
            self._avoided.add((node.place.id, node.joined))
            _log.warning("node %s does not answer", node.place.name)
            telling = asyncio.ensure_future(self._accuse(node.place.id, node.joined))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)

    async def _node(self, model: ModelSettings) -> Standing | None:
        nodes = eligible(model.nodes, self._table.nodes, self._avoided)
        if model.is_remote:
            nodes.sort(key=lambda node: (node.place.id != self._home, node.place.id))
            return nodes[0] if nodes else None
        up = ranked(model.id, nodes, lambda node: self._num_own[node, model.id])
        if up:
            return up[0]
        if not nodes:
            return None
        chosen = await self._send(model.id, frozenset(self._avoided))
        return next((node for node in nodes if node.place.id == chosen), None)

    async def _wait(self) -> None:
        """Wait until there is something else to go by, but not for long."""
        try:
            async with asyncio.timeout(RETRY_SECONDS):
                await self._news.wait()
        except TimeoutError:
            return


class NodeLease:
    """The right to a node, until the last byte; a `lease.Lease`."""

    woken = Woken.NONE  # the node's own answer says more

    def __init__(
        self,
        leases: NodeLeases,
        node: Standing,
        model_id: str,
        counted_id: str,
        ask: Ask,
        waited_seconds: float,
    ) -> None:
        self._leases = leases
        self._node: Standing | None = node
        self._counted_id = counted_id
        self.model_id = model_id
        self.address = Address(
            node.place.url, headers=_headers(node, ask), is_gateway=True, is_ours=True
        )
        self.waited_seconds = waited_seconds
        leases.began(node.place.id, counted_id)

    def first_byte(self) -> bool:
        """See `Lease.first_byte`: whether it may, the node has said by sending it."""
        return True

    def held_by(self, close: HowToClose) -> None:
        """Nobody but this process passes its answer on."""

    def end(self, ending: Ending, *, status: int = 0) -> None:
        """See `Lease.end`."""
        del status
        if (node := self._node) is not None:
            self._node = None
            self._leases.ended(node, self._counted_id, ending)


def _headers(node: Standing, ask: Ask) -> dict[str, str]:
    """Return what a node's gateway has to know of a request beside what its client sent."""
    headers = {TOKEN: node.place.token}
    if ask.class_name is not None:
        headers[CLASS] = ask.class_name
    if ask.deadline_seconds is not None:
        headers[DEADLINE_MS] = str(max(1, round(1000 * ask.deadline_seconds)))
    return headers
