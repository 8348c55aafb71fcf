"""How many replicas a deployment has: one for each node that has what a replica takes.

Serve ships this module to its controller as it is, so it imports nothing of ours.
"""

import time
from typing import Any

import ray

LOOK_SECONDS = 1.0


class OneEachNode:
    """A policy of Serve's autoscaler that follows the nodes and not the load.

    Args:
        takes: What a replica takes of a node, by the names of Ray's resources.
    """

    def __init__(self, takes: dict[str, float]) -> None:
        self._takes = takes
        self._looked_at = 0.0
        self._num = 1

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return how many replicas there are to be, as Serve asks for it.

        A replica that Serve still takes for running counts: of two, one on a machine that died, it
        might end the other one.
        """
        now = time.monotonic()
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            self._num = max(1, num_nodes(self._takes))
        return max(self._num, context.current_num_replicas), {}


def num_nodes(takes: dict[str, float]) -> int:
    """Return how many nodes that are alive have as much as this."""
    return sum(
        node["Alive"]
        and all(node["Resources"].get(name, 0.0) >= num for name, num in takes.items())
        for node in ray.nodes()
    )
