"""The cluster's memory: which nodes there are, what they said, where cold models were sent.

It is called from one loop, and told the time.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace

from kvcached_gateway.policy.placement import MoveSettings, PlacedModel
from kvcached_gateway.state import State
from kvcached_ray.placing import Choice, Site, choose
from kvcached_ray.ranking import eligible
from kvcached_ray.report import Place, Report, Rules, Standing, Table

__all__ = ["SILENT_SECONDS", "Members"]

SILENT_SECONDS = 10.0  # a node that says nothing for so long is given up
PROMISE_SECONDS = 10.0  # what was sent to a node is to show in what it says by then
LABEL_DIGITS = 6


class _Member:
    """A node that reports."""

    def __init__(self, place: Place, joined: int) -> None:
        self.place = place
        self.joined = joined
        self.heard_at = 0.0
        self.report: Report | None = None
        self.placed: dict[str, PlacedModel] = {}

    def take(self, report: Report, now: float) -> None:
        """Take what it says; models that it leaves out are cold, and as they were."""
        self.heard_at = now
        self.report = report
        there = {model.id: model for model in report.scene.models}
        if report.rules is not None:
            self.placed = there
            return
        for name, model in self.placed.items():
            if model.current and name not in there:
                self.placed[name] = model._replace(current=())
        self.placed |= there

    def standing(self) -> Standing:
        report = self.report
        if report is None:
            return Standing(self.place, self.joined, is_draining=True)
        rows = {row.id: row for row in report.models}
        return Standing(self.place, self.joined, report.is_draining, rows, report.devices)

    def site(self) -> Site:
        report = self.report
        if report is None:
            return Site(self.place.id)
        failed = frozenset(row.id for row in report.models if row.state == State.FAILED)
        scene = report.scene
        return Site(self.place.id, self.placed, scene.rooms, scene.staying, failed)


class Members:
    """The nodes.

    Args:
        clock: Monotonic seconds.
        first: Where versions and the numbers of those that join begin: higher than those of a
            cluster before, which doors may still know.
    """

    def __init__(self, clock: Callable[[], float], first: int = 0) -> None:
        self._clock = clock
        self._members: dict[str, _Member] = {}
        self._last_joined = first
        self._promises: dict[str, tuple[Choice, float]] = {}
        self._rules: Rules | None = None
        self.version = first

    def __iter__(self) -> Iterator[Place]:
        """Yield every node."""
        return (member.place for member in self._members.values())

    def reported(self, report: Report) -> bool:
        """Take what a node says.

        Returns:
            Whether that was enough; else it is to say its rules, and all of its models.
        """
        place = report.place
        member = self._members.get(place.id)
        if member is None or member.place.token != place.token:
            if report.rules is None:
                return False
            self._last_joined += 1
            named = replace(place, name=self._free_name(place))
            member = self._members[place.id] = _Member(named, self._last_joined)
        before = member.standing()
        member.take(report, self._clock())
        if report.rules is not None and report.rules != self._rules:
            self._rules = report.rules
            self.version += 1
        elif _shown(member.standing()) != _shown(before):
            self.version += 1
        self._keep_promises(member)
        return True

    def gone(self, node: str, joined: int) -> bool:
        """Give a node up that did not answer; say whether it was that one still."""
        member = self._members.get(node)
        if member is None or member.joined != joined:
            return False
        self._drop(node)
        return True

    def forget_silent(self) -> list[str]:
        """Give up nodes that say nothing any more; return their names."""
        now = self._clock()
        silent = [m for m in self._members.values() if now - m.heard_at > SILENT_SECONDS]
        for member in silent:
            self._drop(member.place.id)
        return [member.place.name for member in silent]

    def table(self) -> Table:
        """Return what doors go by now."""
        nodes = tuple(member.standing() for member in self._members.values())
        return Table(self.version, self._rules, nodes)

    def send(
        self,
        model_id: str,
        wanted: Collection[str],
        settings: MoveSettings,
        avoided: Collection[tuple[str, int]] = (),
    ) -> Choice | None:
        """Return where a cold model goes; the same for whoever asks until it shows there.

        Args:
            model_id: The model.
            wanted: Its `nodes`.
            settings: The file's `placement:`.
            avoided: Nodes that a door had no answer from, each with its `joined`.

        Returns:
            None where there is no node that it may be on.
        """
        now = self._clock()
        self._promises = {name: one for name, one in self._promises.items() if one[1] > now}
        standings = [member.standing() for member in self._members.values()]
        among = {node.place.id for node in eligible(wanted, standings, avoided)}
        promise = self._promises.get(model_id)
        if promise is not None and promise[0].node in among:
            return promise[0]
        promised = {name: choice for name, (choice, _) in self._promises.items()}
        sites = [member.site() for member in self._members.values()]
        choice = choose(model_id, sites, among, settings, promised)
        if choice is not None:
            self._promises[model_id] = choice, now + PROMISE_SECONDS
        return choice

    def find(self, node: str) -> Place | None:
        """Return a node by its id, or None where it is gone."""
        member = self._members.get(node)
        return None if member is None else member.place

    def _drop(self, node: str) -> None:
        del self._members[node]
        self.version += 1
        left = self._promises.items()
        self._promises = {name: one for name, one in left if one[0].node != node}

    def _keep_promises(self, member: _Member) -> None:
        """Forget what was promised, once it shows: its state says all from then on."""
        for name, (choice, _) in list(self._promises.items()):
            row = member.standing().models.get(name)
            if choice.node == member.place.id and row is not None and row.state != State.COLD:
                del self._promises[name]

    def _free_name(self, place: Place) -> str:
        """Return a node's name, longer where another one has it already."""
        others = {m.place.name for m in self._members.values() if m.place.id != place.id}
        if place.name not in others:
            return place.name
        return f"{place.name}-{place.id[:LABEL_DIGITS]}"


def _shown(standing: Standing) -> Mapping[str, object]:
    """Return what of a node makes doors choose otherwise; requests that come and go do not."""
    states = {
        name: (State.WARM if row.state == State.BUSY else row.state, row.devices)
        for name, row in standing.models.items()
    }
    return {"place": standing.place, "is_draining": standing.is_draining, "states": states}
