"""What each model takes and gives back, learned from engines that ran; what a start needs.

Nothing here reads anything: the controller tells it what was measured.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvcached_core.ledger.view import InstanceView
from kvcached_core.memory.model_bytes import OTHER_BYTES, files_bytes, find_folder
from kvcached_core.memory.request_bytes import request_bytes
from kvcached_gateway.control.machine import HOST_MEMORY, DeviceMemory, MachineView
from kvcached_gateway.settings.config import HOST, ModelSettings

__all__ = ["ModelSize", "Sizes", "first_bytes", "kept_bytes", "reachable_bytes"]


@dataclass(frozen=True)
class ModelSize:
    """What one model takes, in bytes; 0 is not known yet.

    Attributes:
        process_bytes: Its processes' own memory on the host.
        residue_bytes: What it holds of each of its devices beside weights and KV cache.
        weights_bytes: Its weights on each of its devices.
        least_bytes: The KV memory of its longest request there.
        token_bytes: The KV memory of one token there.
    """

    process_bytes: int = 0
    residue_bytes: int = 0
    weights_bytes: int = 0
    least_bytes: int = 0
    token_bytes: int = 0


@dataclass(frozen=True)
class StoredSize:
    """What a model's files say, in bytes; 0 where they do not.

    Attributes:
        weights_bytes: All of its weights.
        least_bytes: The KV memory of its longest request on each of its devices.
    """

    weights_bytes: int = 0
    least_bytes: int = 0


class Sizes:
    """What is known of every model.

    Args:
        max_tokens: Says how many tokens the engine of a model lets a request have; None is what the
            model can.
    """

    def __init__(
        self, max_tokens: Callable[[ModelSettings], int | None] = lambda _model: None
    ) -> None:
        self._max_tokens = max_tokens
        self._known: dict[str, ModelSize] = {}
        self._free_alone: dict[str, int] = {}
        self._stored: dict[tuple[str | int | None, ...], StoredSize] = {}
        self._has_residues = False

    def of(self, model_id: str) -> ModelSize:
        """Return what is known of a model."""
        return self._known.get(model_id, ModelSize())

    def learn(
        self,
        running: Iterable[tuple[ModelSettings, Sequence[str]]],
        machine: MachineView,
        passing: Collection[str] = (),
    ) -> None:
        """Take what engines that are up have now; the most that was ever seen counts.

        Args:
            running: Each model that is up, and its devices.
            machine: What there is.
            passing: Devices on which engines come up or end: what those have there would be taken
                for their neighbours'.
        """
        there = list(running)
        kept = {
            model.instance_name: self.weights_bytes(model)
            for model, _ in there
            if model.when_idle != "yield"
        }
        for model, devices in there:
            old = self.of(model.id)
            views = machine.views(model.instance_name, devices)
            residue_bytes = old.residue_bytes
            if not set(devices) & set(passing):
                residue_bytes = max(residue_bytes, self._residue_bytes(machine, devices, kept))
                self._has_residues = True
            self._known[model.id] = ModelSize(
                max(old.process_bytes, machine.engines_bytes.get(model.id, 0)),
                residue_bytes,
                max((view.weights_needed_bytes for view in views), default=0) or old.weights_bytes,
                max((view.least_bytes for view in views), default=0) or old.least_bytes,
                max((view.token_bytes for view in views), default=0) or old.token_bytes,
            )

    def learn_others(self, machine: MachineView) -> None:
        """Take what other programs have of each device, while no engine of ours is there."""
        for name, device in machine.devices.items():
            if not device.instances and device.is_known:
                self._free_alone[name] = device.free_bytes

    def others_bytes(self, device: DeviceMemory) -> int:
        """Return what others have of what engines may use of a device.

        That is what other programs had while no instance was there, and what those have now for
        which `kvcached run` made room.
        """
        free_bytes = self._free_alone.get(device.id)
        if free_bytes is None or device.capacity_bytes is None:
            return device.programs_bytes
        return max(device.capacity_bytes - free_bytes, 0) + device.programs_bytes

    def weights_bytes(self, model: ModelSettings) -> int:
        """Return a model's weights on each of its devices: as measured, else as its files say."""
        if known := self.of(model.id).weights_bytes:
            return known
        return self._stored_size(model).weights_bytes // model.tensor_parallel

    def least_bytes(self, model: ModelSettings) -> int:
        """Return the KV memory of a model's longest request on each of its devices, likewise."""
        return self.of(model.id).least_bytes or self._stored_size(model).least_bytes

    def copy_bytes(self, model: ModelSettings) -> int:
        """Return what the copy of a model's weights takes of the host's memory, on all ranks."""
        yields = model.when_idle == "yield" and not model.is_remote
        return self.weights_bytes(model) * model.tensor_parallel if yields else 0

    def process_bytes(self, model: ModelSettings) -> int:
        """Return what a model's processes take; of one that never ran, what the largest has."""
        return self.of(model.id).process_bytes or self._most("process_bytes")

    def residue_bytes(self, model: ModelSettings) -> int:
        """Return what a model holds of each device beside weights and KV cache, likewise."""
        return self.of(model.id).residue_bytes or self._most("residue_bytes")

    def device_bytes(self, model: ModelSettings, device: DeviceMemory) -> int:
        """Return what a start of a model takes of a device: weights, residue and a longest request.

        An engine starts also where that request does not fit beside its weights, whoever is
        stopped; then nobody has to be for it.
        """
        residue_bytes = self.residue_bytes(model)
        if not self._has_residues and device.id != HOST:
            residue_bytes = OTHER_BYTES  # what engines say before they know it themselves
        loaded_bytes = residue_bytes + self.weights_bytes(model)
        needed_bytes = loaded_bytes + self.least_bytes(model)
        if device.capacity_bytes is None:
            return needed_bytes
        most_bytes = device.capacity_bytes - self.others_bytes(device)
        return needed_bytes if needed_bytes <= most_bytes else loaded_bytes

    def host_bytes(self, model: ModelSettings) -> int:
        """Return what a start of a model takes of the host's memory."""
        return self.process_bytes(model) + self.copy_bytes(model)

    def needed_bytes(self, model: ModelSettings, devices: Iterable[DeviceMemory]) -> dict[str, int]:
        """Return what a start of a model takes, by place."""
        needed = {device.id: self.device_bytes(model, device) for device in devices}
        return {HOST_MEMORY: self.host_bytes(model)} | needed

    def _stored_size(self, model: ModelSettings) -> StoredSize:
        """Return what a model's files say; they are read once."""
        if model.model is None:
            return StoredSize()
        parts, max_tokens = model.tensor_parallel, self._max_tokens(model)
        key = (model.model, model.revision, parts, max_tokens)
        if key not in self._stored:
            folder = find_folder(model.model, model.revision)
            self._stored[key] = (
                StoredSize()
                if folder is None
                else StoredSize(files_bytes(folder), request_bytes(folder, max_tokens, parts))
            )
        return self._stored[key]

    def _residue_bytes(
        self, machine: MachineView, devices: Iterable[str], kept: Mapping[str, int]
    ) -> int:
        """Return an engine's part of what is in use and in nobody's count.

        Weights that never yield are in no count either, but they are known.
        """
        most = 0
        for name in devices:
            device = machine.devices.get(name)
            if device is None or not device.engines:
                continue
            known = sum(kept.get(view.name, 0) for view in device.engines)
            unnamed = device.unnamed_bytes - self.others_bytes(device) - known
            most = max(most, unnamed // len(device.engines))
        return most

    def _most(self, field: str) -> int:
        return max((int(getattr(size, field)) for size in self._known.values()), default=0)


def reachable_bytes(
    device: DeviceMemory, idle: Collection[str], soon: Collection[str] = ()
) -> int | None:
    """Return what a start could have of a device without anybody's end: what is free or yields.

    Args:
        device: The device.
        idle: The instances without requests, whose weights may go.
        soon: Those that have some, and will have none for a moment.

    Returns:
        None where nobody knows yet how much there is.
    """
    if not device.is_known:
        return None
    given_bytes = 0
    for view in device.instances:
        given_bytes += view.idle_bytes + view.cached_bytes
        if view.name in idle:
            given_bytes += view.weights_offered_bytes
        elif view.name in soon:  # it offers none while it computes
            given_bytes += view.weights_bytes
    return device.free_bytes + given_bytes


def first_bytes(view: InstanceView | None) -> int:
    """Return what an engine has of a device for as long as it is there, also when it waits.

    Its first page is that, or what its floor guarantees.
    """
    return 0 if view is None else max(view.page_bytes, view.floor_bytes)


def kept_bytes(view: InstanceView | None) -> int:
    """Return what an idle engine has of a device and does not give while it is there.

    Its first page is that, what its floor guarantees, and weights that have no copy yet; all that
    is not in `reachable_bytes`.
    """
    if view is None:
        return 0
    given_bytes = view.idle_bytes + view.cached_bytes + view.weights_offered_bytes
    return max(view.resident_bytes + view.promised_bytes - given_bytes, 0)
