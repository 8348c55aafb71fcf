"""Every model that is up, as who might be stopped for another one, and what its end gives back."""

import math
from collections.abc import Callable, Collection, Sequence

from kvcached_gateway.control.demands import Demands
from kvcached_gateway.control.machine import HOST_MEMORY
from kvcached_gateway.control.sizes import Sizes, first_bytes, kept_bytes
from kvcached_gateway.models.fleet import Fleet
from kvcached_gateway.models.model import Model
from kvcached_gateway.policy.eviction import Candidate
from kvcached_gateway.state import UP

__all__ = ["Candidates"]


class Candidates:
    """Who might be stopped.

    Args:
        fleet: The models.
        sizes: What models take.
        demands: What is asked of each.
        is_pinned: Whether a model is never stopped for another.
    """

    def __init__(
        self, fleet: Fleet, sizes: Sizes, demands: Demands, is_pinned: Callable[[Model], bool]
    ) -> None:
        self._fleet = fleet
        self._sizes = sizes
        self._demands = demands
        self._is_pinned = is_pinned

    def on(
        self,
        devices: Sequence[str],
        now: float,
        stuck: Collection[str] = (),
        holding: Collection[str] = (),
    ) -> list[Candidate]:
        """Return every model that is up, and what its end gives back of some devices.

        Args:
            devices: The devices.
            now: The loop's seconds.
            stuck: Models that may go though they have requests.
            holding: Likewise, as soon as their answers have ended: they are asked nothing more.
        """
        return [
            self._candidate(
                model, devices, now, is_stuck=model.id in stuck, is_holding=model.id in holding
            )
            for model in self._fleet.models.values()
            if model.state in UP and not model.settings.is_remote
        ]

    def may_not_go(self, model: Model) -> bool:
        """Whether a model is not to be stopped for another one, however old it is."""
        return self._is_busy(model) or self.never_goes(model)

    def never_goes(self, model: Model) -> bool:
        """Whether a model is never stopped for another one, also when it is idle."""
        return self._is_pinned(model) or model.settings.when_idle == "stay"

    def _is_busy(self, model: Model) -> bool:
        return bool(model.num_leases or self._demands.waiting(model.id))

    def _candidate(
        self,
        model: Model,
        devices: Sequence[str],
        now: float,
        *,
        is_stuck: bool,
        is_holding: bool,
    ) -> Candidate:
        settings, size = model.settings, self._sizes.of(model.id)
        # What else an idle engine has yields anyway, and what a stuck one has does when it is its
        # turn: it is in what is free. What one has that holds back does when its answers ended.
        has_more = is_stuck or (is_holding and model.num_leases)
        kept = first_bytes(model.view) if has_more else kept_bytes(model.view)
        freed = {HOST_MEMORY: size.process_bytes + self._sizes.copy_bytes(settings)}
        for name in set(model.devices) & set(devices):
            freed[name] = size.residue_bytes + kept
            if settings.when_idle != "yield":
                freed[name] += self._sizes.weights_bytes(settings)
        service = self._fleet.settings.classes.get(settings.class_name or "")
        return Candidate(
            id=model.id,
            freed_bytes=freed,
            frequency=self._demands.of(model.id).frequency.at(now),
            start_seconds=model.start_seconds,
            is_busy=self._is_busy(model) and not (is_stuck or is_holding),
            is_pinned=self.never_goes(model),
            idle_seconds=math.inf if is_holding else now - model.last_used,
            warm_seconds=now - model.up_at,
            begun_seconds=now - model.up_at + (model.last_start_seconds or 0.0),
            class_weight=1.0 if service is None else service.weight,
        )
