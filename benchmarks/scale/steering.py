"""The gateway's decisions over a simulated cluster: who is placed where, stopped, and moved."""

from collections.abc import Sequence

from scale.clock import deciding
from scale.cluster import Device, Model, State
from scale.inputs import Measured
from scale.serving import Serving

from kvcached_gateway.policy.demand import weighted_rate
from kvcached_gateway.policy.eviction import Candidate, choose
from kvcached_gateway.policy.placement import DeviceRoom, Move, PlacedModel, place
from kvcached_gateway.settings.config import MemorySettings, PlacementSettings

HOST = "host"
PLACEMENT = PlacementSettings()
MEMORY = MemorySettings()


class Steering:
    """What looks at the cluster from time to time.

    Args:
        models: All models, by their numbers.
        devices: All devices.
        measured: What an engine and a device hold.
        serving: What the devices do.
    """

    def __init__(
        self,
        models: Sequence[Model],
        devices: Sequence[Device],
        measured: Measured,
        serving: Serving,
    ) -> None:
        self.models = models
        self.clock, self.tally, self.assumed = serving.clock, serving.tally, serving.assumed
        self._serving = serving
        self._residue_bytes = measured.residue_bytes
        self._devices = {device.id: device for device in devices}
        self._rooms = [DeviceRoom(device.id, measured.device_bytes) for device in devices]
        self._wanted: dict[int, Model] = {}
        self._looked_at = 0.0
        self._num_moving = 0

    def want(self, model: Model) -> None:
        """Let a cold model be started at the next look."""
        self._wanted[model.number] = model

    def begin(self, tokens_per_second: Sequence[float]) -> None:
        """Place all models at once, and let those be up that the hosts have memory for."""
        placed = [
            self._described(
                model, weighted_rate(rate, model.token_bytes, self.assumed.tpot_seconds)
            )
            for model, rate in zip(self.models, tokens_per_second, strict=True)
        ]
        with deciding("place all from nothing", self.tally):
            found = place(placed, self._rooms, PLACEMENT, 0.0)
        for number in sorted(range(len(self.models)), key=lambda one: -tokens_per_second[one]):
            model = self.models[number]
            names = found.devices.get(str(number))
            copy_bytes = model.copy_bytes(self.assumed.process_bytes)
            if names and self._devices[names[0]].node.host_free_bytes >= copy_bytes:
                self._settle(model, self._devices[names[0]])
                model.state = State.UP
                self._serving.started(model)
                self.tally.count("up at midnight", 0.0)
        self.look()

    def look(self) -> None:
        """Place who waits for a place, and look for a move where the last look is long ago."""
        now = self.clock.now
        is_due = now - self._looked_at >= self.assumed.look_seconds
        if is_due:
            self._looked_at = now
            for model in self.models:
                if model.state is not State.COLD:
                    model.demand.counted(model.computed, model.computed, now)
        if is_due or self._wanted:
            self._place(now)
        self.clock.after(self.assumed.place_seconds, self.look)

    def _place(self, now: float) -> None:
        up = [model for model in self.models if model.state is not State.COLD]
        placed = [
            self._described(model, self._rate(model)) for model in (*up, *self._wanted.values())
        ]
        with deciding("place", self.tally):
            found = place(placed, self._rooms, PLACEMENT, now)
        for model in list(self._wanted.values()):
            names = found.devices.get(str(model.number))
            if not names:
                self.tally.count("had no place", now)
            elif self._has_host_memory(model, self._devices[names[0]], now):
                del self._wanted[model.number]
                self._start(model, self._devices[names[0]])
            else:
                self.tally.count("had no host memory", now)
        for move in found.moves:
            self._move(move)

    def _described(self, model: Model, rate: float | None) -> PlacedModel:
        return PlacedModel(
            str(model.number),
            rate,
            model.weights_bytes,
            self._residue_bytes,
            is_resident=model.num_requests > 0,
            current=(model.device.id,) if model.device else (),
            is_movable=model.state is State.UP and model.num_requests == 0,
            moved_at=model.moved_at,
        )

    def _rate(self, model: Model) -> float | None:
        tokens_per_second = model.demand.tokens.per_second
        return weighted_rate(tokens_per_second, model.token_bytes, self.assumed.tpot_seconds)

    def _settle(self, model: Model, device: Device) -> None:
        """Let a model's engine be there: its residue, its process and its copy."""
        model.device = device
        device.free_bytes -= self._residue_bytes
        device.node.host_free_bytes -= model.copy_bytes(self.assumed.process_bytes)
        device.node.up[model.number] = model

    def _leave(self, model: Model) -> None:
        """Let its engine end; it is idle."""
        device = model.on
        if model.is_awake:
            del device.idle[model.number]
            device.free_bytes += model.weights_bytes
        device.free_bytes += self._residue_bytes
        device.node.host_free_bytes += model.copy_bytes(self.assumed.process_bytes)
        del device.node.up[model.number]
        model.device, model.is_awake = None, False

    def _start(self, model: Model, device: Device) -> None:
        self._settle(model, device)
        model.state = State.STARTING
        self.tally.count("starts", self.clock.now)
        self.clock.after(self._until_started(model, device), self._started, model)

    def _until_started(self, model: Model, device: Device) -> float:
        """Return when a start that begins now ends: a device has one at a time."""
        begins_at = max(self.clock.now, device.starts_free_at)
        device.starts_free_at = begins_at + model.start_seconds
        return device.starts_free_at - self.clock.now

    def _started(self, model: Model) -> None:
        model.state, model.up_since = State.UP, self.clock.now
        self._serving.started(model)

    def _has_host_memory(self, model: Model, device: Device, now: float) -> bool:
        """Whether the host has memory for a model, after others were stopped for it."""
        node = device.node
        short_bytes = model.copy_bytes(self.assumed.process_bytes) - node.host_free_bytes
        if short_bytes <= 0:
            return True
        candidates = [self._candidate(one, now) for one in node.up.values()]
        with deciding("choose", self.tally):
            chosen = choose(
                candidates, {HOST: short_bytes}, node.aging, MEMORY, now, is_for_request=True
            )
        node.aging = chosen.state
        for name in chosen.victims:
            victim = self.models[int(name)]
            self._leave(victim)
            victim.state = State.COLD
            self.tally.count("stops", now)
        return bool(chosen.victims)

    def _candidate(self, model: Model, now: float) -> Candidate:
        is_up = model.state is State.UP
        return Candidate(
            str(model.number),
            {HOST: model.copy_bytes(self.assumed.process_bytes)},
            model.demand.frequency.at(now),
            model.start_seconds,
            is_busy=model.num_requests > 0 or model.is_waking or not is_up,
            is_pinned=False,
            idle_seconds=now - model.last_used,
            warm_seconds=now - model.up_since,
        )

    def _move(self, move: Move) -> None:
        """Start a model elsewhere, where that host has memory and no other one moves."""
        model, target = self.models[int(move.model)], self._devices[move.target[0]]
        copy_bytes = model.copy_bytes(self.assumed.process_bytes)
        if self._num_moving or target.node.host_free_bytes < copy_bytes:
            self.tally.count("moves not begun", self.clock.now)
            return
        self._num_moving += 1
        target.node.host_free_bytes -= copy_bytes
        self.clock.after(self._until_started(model, target), self._moved, model, target)

    def _moved(self, model: Model, target: Device) -> None:
        """Let it serve there, unless it was stopped; while it is busy it waits a second."""
        if model.state is State.UP and (model.num_requests or model.is_waking):
            self.clock.after(1.0, self._moved, model, target)
            return
        self._num_moving -= 1
        target.node.host_free_bytes += model.copy_bytes(self.assumed.process_bytes)
        if model.state is State.UP and model.device is not target:
            self._leave(model)
            self._settle(model, target)
            model.moved_at = self.clock.now
            self.tally.count("moves", self.clock.now)
