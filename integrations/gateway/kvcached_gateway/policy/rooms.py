"""All devices and what lies on them, so that the least pressed one is found without asking each.

With a share more, a device's KV pressure ratio is `(pressure * free + rate) / (free - taken)`. It
grows with the pressure and falls with what is free. So devices that have about as much free stand
in one group, by their pressure, and with the most that one of them has free no later one of the
group is below `(pressure * most + rate) / (most - taken)`. A search leaves a group there.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kvcached_gateway.policy.load import Load, Share

GROUP_LOG = math.log(1.1)  # of the most that a device of a group has free and the least


class Standing(NamedTuple):
    """How a device stands in its group; sorted by pressure, and of equals who has most free.

    Attributes:
        pressure: Its KV pressure ratio.
        less_free_bytes: What it has free, negative.
        id: The device.
        left_bytes: What is free beside all floors.
        left_awake_bytes: The same while the largest weights of it have come back.
    """

    pressure: float
    less_free_bytes: int
    id: str
    left_bytes: int
    left_awake_bytes: int

    def fits(self, share: Share) -> bool:
        """Whether one more would leave each model enough to wake, as `Load.spare_bytes` says it."""
        needed_bytes = share.taken_bytes + share.floor_bytes
        is_room_for_it = self.left_bytes > needed_bytes + share.wake_bytes
        return is_room_for_it and self.left_awake_bytes > needed_bytes


@dataclass
class Group:
    """Devices that have about as much free.

    Attributes:
        standings: They, the least pressed first.
        less_free_bytes: What each has free, negative, the most first.
    """

    standings: list[Standing] = field(default_factory=list)
    less_free_bytes: list[int] = field(default_factory=list)

    def add(self, standing: Standing) -> None:
        """Take a device in."""
        insort(self.standings, standing)
        insort(self.less_free_bytes, standing.less_free_bytes)

    def remove(self, standing: Standing) -> None:
        """Let it go."""
        del self.standings[bisect_left(self.standings, standing)]
        del self.less_free_bytes[bisect_left(self.less_free_bytes, standing.less_free_bytes)]


class Rooms:
    """The devices. Adding and searching take far less than a look at each of them."""

    def __init__(self, loads: Mapping[str, Load]) -> None:
        self._loads = loads
        self._groups: dict[int, Group] = {}
        self._standings: dict[str, Standing] = {}
        for load in loads.values():
            self._stand(load)

    def add(self, names: Iterable[str], share: Share) -> None:
        """Put a model's share on each of these devices."""
        for name in names:
            before = self._standings[name]
            if before.less_free_bytes < 0:
                self._group_of(before).remove(before)
            load = self._loads[name]
            load.add(share)
            self._stand(load)

    def best(
        self,
        share: Share,
        num: int,
        allowed: frozenset[str] | None,
        *,
        without: Collection[str] = (),
    ) -> tuple[str, ...]:
        """Return the `num` devices that it fits on where the ratio will be least; or none."""
        found: list[tuple[float, int, str]] = []
        for most_bytes, standings in self._promising(share):
            scale = most_bytes - share.taken_bytes
            for standing in standings:
                least = (standing.pressure * most_bytes + share.rate) / scale
                if len(found) == num and least >= found[-1][0]:
                    break
                is_allowed = allowed is None or standing.id in allowed
                if is_allowed and standing.id not in without and standing.fits(share):
                    pressure = self._loads[standing.id].pressure(plus=share)
                    insort(found, (pressure, standing.less_free_bytes, standing.id))
                    del found[num:]
        return tuple(name for _, _, name in found) if len(found) == num else ()

    def _promising(self, share: Share) -> Iterator[tuple[int, list[Standing]]]:
        """Yield the most that is free in each group, and its devices; the best group first."""
        needed_bytes = share.taken_bytes + share.floor_bytes + share.wake_bytes
        order = []
        for key, group in self._groups.items():
            if group.standings and (most_bytes := -group.less_free_bytes[0]) > needed_bytes:
                pressure = group.standings[0].pressure
                ratio = (pressure * most_bytes + share.rate) / (most_bytes - share.taken_bytes)
                order.append((ratio, key))
        for _, key in sorted(order):
            group = self._groups[key]
            yield -group.less_free_bytes[0], group.standings

    def _stand(self, load: Load) -> None:
        standing = Standing(
            load.pressure(), -load.free_bytes, load.id, load.left_bytes, load.left_awake_bytes
        )
        self._standings[load.id] = standing
        if load.free_bytes > 0:
            self._group_of(standing).add(standing)

    def _group_of(self, standing: Standing) -> Group:
        key = int(math.log(-standing.less_free_bytes) / GROUP_LOG)
        return self._groups.setdefault(key, Group())
