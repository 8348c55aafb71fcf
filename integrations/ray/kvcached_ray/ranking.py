"""Which nodes a request may go to, the best first: values in, an order out."""

from collections.abc import Callable, Collection, Iterable, Sequence

from kvcached_gateway.admin.views import ModelRow
from kvcached_gateway.state import State
from kvcached_ray.report import Place, Standing

__all__ = ["eligible", "matches", "ranked"]

# A model that is up whole is asked before one that has to wake, and that before one that starts.
RANKS = {
    State.WARM: 0,
    State.BUSY: 0,
    "remote": 0,
    State.YIELDED: 1,
    State.STARTING: 2,
}


def matches(wanted: Collection[str], place: Place) -> bool:
    """Whether a node is one of those that a model may be on; nothing wanted is any."""
    return not wanted or not place.labels.isdisjoint(wanted)


def eligible(
    wanted: Collection[str], nodes: Iterable[Standing], avoided: Collection[tuple[str, int]] = ()
) -> list[Standing]:
    """Return the nodes that a model may be on and that take requests.

    Args:
        wanted: The model's `nodes`.
        nodes: All nodes.
        avoided: Nodes that did not answer, each with its `joined`.
    """
    return [
        node
        for node in nodes
        if not node.is_draining
        and (node.place.id, node.joined) not in avoided
        and matches(wanted, node.place)
    ]


def ranked(
    model_id: str, nodes: Iterable[Standing], num_own: Callable[[str], int]
) -> Sequence[Standing]:
    """Return the nodes that have a model, or are about to; the first one is to be asked.

    Of those that have it in the same state the one with the fewest requests goes first.

    Args:
        model_id: The model.
        nodes: The nodes that it may be on.
        num_own: How many of its requests this door has at a node, which no report tells yet.
    """
    found = []
    for node in nodes:
        row = node.models.get(model_id)
        if row is not None and row.state in RANKS:
            num = max(_num_requests(row), num_own(node.place.id))
            found.append((RANKS[row.state], num, node.place.name, node))
    found.sort(key=lambda one: one[:3])
    return [node for *_, node in found]


def _num_requests(row: ModelRow) -> int:
    return row.num_leases + row.num_waiting
