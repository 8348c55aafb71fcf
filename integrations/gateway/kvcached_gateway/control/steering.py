"""What the admin socket and the metrics see of the gateway, and the verbs that steer it."""

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from kvcached_core import control
from kvcached_core.errors import KVCachedError
from kvcached_gateway.admin.events import Events
from kvcached_gateway.admin.views import About, Decision, DeviceRow, ModelRow
from kvcached_gateway.control.controller import Controller
from kvcached_gateway.control.machine import HOST_MEMORY
from kvcached_gateway.errors import RefusedVerbError
from kvcached_gateway.line.line import Line
from kvcached_gateway.models.fleet import Fleet
from kvcached_gateway.models.model import Model
from kvcached_gateway.settings.config import ModelSettings, Settings
from kvcached_gateway.state import UP, State

__all__ = ["Gateway"]

SLEEP_SECONDS = 5.0


class Gateway:
    """The gateway as a whole: an `admin.Steering`.

    Args:
        fleet: The models.
        line: Where requests wait.
        controller: What decides.
        directory: The folder of the ledgers.
        read: Reads the file again; raises `ConfigError`.

    Attributes:
        events: What happens.
        is_draining: Whether it takes no new requests.
        drained: Set when it shall end.
        on_rules: Called when something else holds for requests: after a reload, and for a drain.
    """

    def __init__(
        self,
        fleet: Fleet,
        line: Line,
        controller: Controller,
        directory: Path,
        read: Callable[[], Settings],
        events: Events,
    ) -> None:
        self._fleet = fleet
        self._line = line
        self._controller = controller
        self._directory = directory
        self._read = read
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()
        self.events = events
        self.is_draining = False
        self.drained = asyncio.Event()
        self.on_rules: list[Callable[[], None]] = []
        self.listen = fleet.settings.listen
        self._reloading = asyncio.Lock()

    def about(self) -> About:
        """See `Steering.about`."""
        file = str(self._fleet.settings.path)
        return About(file, self.listen, os.getpid(), self._clock() - self._began, self.is_draining)

    def models(self) -> Sequence[ModelRow]:
        """See `Steering.models`."""
        return [self._row(each) for each in self._fleet.settings.models.values()]

    def models_in_use(self) -> Sequence[ModelRow]:
        """Return those that have an engine, or failed, or that somebody waits for."""
        return [
            self._row(model.settings)
            for model in self._fleet.models.values()
            if model.state is not State.COLD or self._line.waiting(model.id)
        ]

    def devices(self) -> Sequence[DeviceRow]:
        """See `Steering.devices`."""
        machine = self._controller.machine
        if machine is None:
            return []
        models = self._fleet.models.values()
        pressures = self._controller.pressures
        rows = [
            DeviceRow(
                name,
                device.capacity_bytes or 0,
                device.free_bytes,
                tuple(model.id for model in models if name in model.devices),
                pressures.get(name, 0.0),
            )
            for name, device in machine.devices.items()
        ]
        held = tuple(model.id for model in models if model.id in machine.engines_bytes)
        return [*rows, DeviceRow(HOST_MEMORY, machine.budget_bytes, machine.free_host_bytes, held)]

    def decisions(self) -> Sequence[Decision]:
        """See `Steering.decisions`."""
        return list(self._controller.decisions)

    async def explain(self, model_id: str) -> str:
        """See `Steering.explain`."""
        settings = self._fleet.settings.models[model_id]
        if settings.adapter_of is None:
            return self._controller.explain(model_id)
        text = self._controller.explain(settings.adapter_of)
        return f"{model_id} is an adapter of {settings.adapter_of}\n{text}"

    async def steer(self, model_id: str, verb: str) -> str:
        """See `Steering.steer`."""
        settings = self._fleet.settings.models[model_id]
        if settings.is_adapter:
            raise RefusedVerbError(
                f"{model_id!r} is an adapter of {settings.adapter_of!r}; {verb} that one"
            )
        model = self._fleet.models[model_id]
        if settings.is_remote and verb != "warm":
            raise RefusedVerbError(f"{model_id!r} is served elsewhere; it is not ours to {verb}")
        match verb:
            case "warm":
                self._controller.warm(model_id)
                return f"{model_id} is up, or on its way"
            case "sleep":
                return await self._sleep(model)
            case "stop":
                self._controller.stop(model_id)
                self._line.changed(model_id)
                return f"{model_id} ends when its {model.num_leases} requests are done"
            case _:
                self._controller.pin(model_id, is_pinned=verb == "pin")
                never = "never" if verb == "pin" else "again"
                return f"{model_id} is {never} stopped for another one"

    async def settled(self, model_id: str) -> None:
        """See `Steering.settled`."""
        settings = self._fleet.settings.models[model_id]
        await self._controller.settled(settings.adapter_of or model_id)

    async def reload(self) -> str:
        """See `Steering.reload`; limits, floors and priorities hold at once, too."""
        async with self._reloading:  # what was read last is what holds
            return await self._reload()

    async def _reload(self) -> str:
        new = await asyncio.to_thread(self._read)
        old = self._fleet.settings.models
        found = self._fleet.reload(new)
        told = [await self._tell(old[name], new.models[name]) for name in found.adjusted]
        self._tell_rules()
        for name in (*self._fleet.models, *found.removed):
            self._line.changed(name)
        fixed = f"; {', '.join(found.fixed)} hold after a restart only" if found.fixed else ""
        return "; ".join([found.sentence(), *filter(None, told)]) + fixed

    def drain(self) -> None:
        """See `Steering.drain`."""
        self.is_draining = True
        self._tell_rules()
        self.drained.set()

    def _tell_rules(self) -> None:
        for tell in self.on_rules:
            tell()

    async def _sleep(self, model: Model) -> str:
        if model.state not in UP:
            raise RefusedVerbError(f"{model.id!r} is {model.state}; only one that is up can yield")
        result = await asyncio.to_thread(
            control.sleep,
            model.settings.instance_name,
            directory=self._directory,
            wait_seconds=SLEEP_SECONDS,
        )
        if result.reason:
            raise RefusedVerbError(result.reason)
        return "; ".join([control.describe(result), *result.problems])

    async def _tell(self, old: ModelSettings, new: ModelSettings) -> str:
        """Tell an engine that runs its new limit, floor and priority; return what it refused."""
        model = self._fleet.models.get(new.id)
        if model is None or model.state not in UP or old.kv == new.kv:
            return ""
        return await asyncio.to_thread(self._tell_kv, old, new)

    def _tell_kv(self, old: ModelSettings, new: ModelSettings) -> str:
        name, directory = new.instance_name, self._directory
        results: list[control.Result] = []
        problem = ""
        try:
            if old.kv.limit != new.kv.limit:
                limit = control.NONE if new.kv.limit is None else str(new.kv.limit)
                results.append(
                    control.set_limit(name, limit, directory=directory, wait_seconds=0.0)
                )
            if old.kv.floor != new.kv.floor:
                floor = control.NONE if new.kv.floor is None else str(new.kv.floor)
                results.append(
                    control.set_floor(name, floor, directory=directory, wait_seconds=0.0)
                )
            if old.kv.priority != new.kv.priority:
                results.append(
                    control.set_priority(name, new.kv.priority or 0, directory=directory)
                )
        except KVCachedError as error:
            problem = str(error)
        told = [reason for result in results for reason in (result.reason, *result.problems)]
        return "; ".join(filter(None, dict.fromkeys([*told, problem])))

    def _row(self, settings: ModelSettings) -> ModelRow:
        if settings.adapter_of is not None:
            return ModelRow(settings.id, "adapter", reason=f"of {settings.adapter_of}")
        model, now = self._fleet.models[settings.id], self._clock()
        demand = self._line.demand(settings.id)
        speed = demand.bytes_per_second.value or 0.0
        return ModelRow(
            id=settings.id,
            state="remote" if settings.is_remote and model.state in UP else str(model.state),
            instance="" if settings.is_remote else settings.instance_name,
            since_seconds=now - model.since,
            reason=self._controller.held(settings.id) or model.reason,
            devices=model.devices,
            num_leases=model.num_leases,
            num_waiting=self._line.waiting(settings.id),
            oldest_wait_seconds=self._line.oldest_wait_seconds(settings.id, now),
            num_starts=model.num_starts,
            start_seconds=model.start_seconds,
            class_name=settings.class_name,
            is_pinned=self._controller.is_pinned(model),
            failure=model.failure,
            retry_seconds=max(model.next_try_at - now, 0.0) if model.state is State.FAILED else 0.0,
            log=self._fleet.log_of(model),
            weighted_rate=self._controller.weighted_rate(model) or 0.0,
            prefill_tokens_per_second=demand.prompt_tokens(1) * speed,
        )
