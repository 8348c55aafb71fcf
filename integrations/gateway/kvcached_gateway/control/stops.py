"""Who is stopped for another model, and whose memory is on its way back because of it."""

from collections.abc import Callable, Collection, Mapping, Sequence

from kvcached_gateway.control.candidates import Candidates
from kvcached_gateway.control.decisions import Decisions
from kvcached_gateway.control.demands import Demands
from kvcached_gateway.control.givers import Givers, names
from kvcached_gateway.control.holds import Holds
from kvcached_gateway.control.machine import HOST_MEMORY
from kvcached_gateway.control.sizes import Sizes
from kvcached_gateway.models.fleet import Fleet
from kvcached_gateway.models.model import Model
from kvcached_gateway.policy import eviction
from kvcached_gateway.state import UP

__all__ = ["Stops"]

# An engine whose last answer has ended says within this time which weights it offers.
OFFER_SECONDS = 2.0


class Stops:
    """Models that are stopped for others.

    Args:
        fleet: The models.
        sizes: What models take.
        demands: What is asked of each.
        decisions: Where decisions are kept.
        is_pinned: Whether a model is never stopped for another.
        holds: Who takes no new requests, and for whom.

    Attributes:
        givers: Who was stopped for whom, and is not gone yet.
    """

    def __init__(
        self,
        fleet: Fleet,
        sizes: Sizes,
        demands: Demands,
        decisions: Decisions,
        is_pinned: Callable[[Model], bool],
        holds: Holds,
    ) -> None:
        self._fleet = fleet
        self._decisions = decisions
        self._holds = holds
        self._candidates = Candidates(fleet, sizes, demands, is_pinned)
        self._aging = eviction.Aging()
        # Of models that waited for memory: how many starts they had when somebody was stopped.
        self._relieved: dict[str, int] = {}
        self.givers = Givers(fleet)

    def evict(
        self,
        model: Model,
        devices: Sequence[str],
        missing: Mapping[str, int],
        now: float,
        stuck: Collection[str] = (),
    ) -> bool:
        """Stop whoever is worth least, if that is enough; say whether somebody was.

        Args:
            model: For whom.
            devices: Where it is, or is to be.
            missing: What it lacks, by place.
            now: The loop's seconds.
            stuck: Models that go at once where no idle one may, though they have requests: those
                are asked again.
        """
        holding = self._holding(model, now)
        chosen = self._choose(self._candidates.on(devices, now, holding=holding), missing, now)
        if stuck and not chosen.victims:
            chosen = self._choose(self._candidates.on(devices, now, stuck), missing, now)
        self._aging = chosen.state
        if not chosen.victims:
            reasons = filter(None, (chosen.reason, self._holds.turn(model.id).reason))
            self._decisions.add(model.id, "wait", "; ".join(reasons), missing=missing)
            return False
        self._relieved[model.id] = model.num_starts
        self.givers.stopped(model.id, chosen.victims)
        why = f"it waits until {names(chosen.victims)} gave back what they hold"
        self._decisions.add(model.id, "wait", why)
        for name in chosen.victims:
            self._decisions.add(name, "stop", f"for {model.id!r}: {chosen.reason}", missing=missing)
            why = f"{model.id!r} needs its memory"
            self._fleet.models[name].stop(why, is_at_once=name in stuck)
        return True

    def next_to_go(self, now: float) -> eviction.Eviction:
        """Return who would be stopped for some of the host's memory, and why others would not."""
        return self._choose(self._candidates.on((), now), {HOST_MEMORY: 1}, now)

    def ends(
        self, devices: Sequence[str], now: float, holding: Collection[str] = ()
    ) -> list[tuple[eviction.Candidate, str]]:
        """Return every model that might be stopped, and why it stays; nothing where it may go.

        Args:
            devices: Of which it is said what their ends give back.
            now: The loop's seconds.
            holding: Models that count as if their answers had ended.
        """
        found = self._candidates.on(devices, now, holding=holding)
        stays = self._choose(found, {}, now).stays
        return [(one, stays.get(one.id, "")) for one in found]

    def never_goes(self, model: Model) -> bool:
        """Whether a model is never stopped for another one, also when it is idle."""
        return self._candidates.never_goes(model)

    def may_not_go(self, model: Model) -> bool:
        """Whether a model is not to be stopped for another one, however old it is."""
        return self._candidates.may_not_go(model)

    def was_relieved(self, model: Model) -> bool:
        """Whether somebody was stopped for a model since its last start."""
        return self._relieved.get(model.id) == model.num_starts

    def _holding(self, model: Model, now: float) -> set[str]:
        """Return who holds back for a start, once all of these are idle and offer what they do."""
        held_ids = self._holds.turn(model.id).held if model.state not in UP else ()
        held = [self._fleet.models[name] for name in held_ids if name in self._fleet.models]
        are_idle = all(not one.num_leases and now - one.last_used > OFFER_SECONDS for one in held)
        return {one.id for one in held} if are_idle else set()

    def _choose(
        self, candidates: Sequence[eviction.Candidate], missing: Mapping[str, int], now: float
    ) -> eviction.Eviction:
        settings = self._fleet.settings.memory
        return eviction.choose(candidates, missing, self._aging, settings, now, is_for_request=True)
