"""Every model of the file as an object, and the file of what runs; it follows reloads and moves."""

import asyncio
import logging
from collections.abc import Callable, Mapping

from kvcached_gateway.engines.runner import Runner
from kvcached_gateway.engines.sessions import kill_session, orphans
from kvcached_gateway.engines.state_file import EngineRecord, Folder
from kvcached_gateway.errors import StateFileError
from kvcached_gateway.line.grantor import Readiness
from kvcached_gateway.models.model import Changed, Model
from kvcached_gateway.models.protocols import RunningEngine
from kvcached_gateway.models.remote import find_remote
from kvcached_gateway.models.watch import Patience
from kvcached_gateway.settings.config import ModelSettings, Settings
from kvcached_gateway.settings.reload import Difference, difference
from kvcached_gateway.state import GONE, UP, State

__all__ = ["Fleet"]

_log = logging.getLogger(__name__)


class Fleet:
    """The models.

    Args:
        settings: What the file says.
        runner: What starts and adopts engines of ours.
        folder: The gateway's folder.
        patience: How long engines are waited for.

    Attributes:
        models: Every model that has an engine of its own, by its name, in the file's order.
        settings: What the file says now.
        stale: Models whose engines are not what the file says any more; they end when idle.
        on_change: Called after each transition of a model, as `model.Changed`.
        on_lease: Called when a lease of a model began to be answered, or came back.
    """

    def __init__(
        self, settings: Settings, runner: Runner, folder: Folder, patience: Patience | None = None
    ) -> None:
        self._runner = runner
        self._folder = folder
        self._patience = patience
        self._leaving: set[Model] = set()
        self._seconds: set[Model] = set()
        self._is_kept = False
        self.settings = settings
        self.models: dict[str, Model] = {}
        self.stale: set[str] = set()
        self.on_change: list[Changed] = []
        self.on_lease: list[Callable[[Model], None]] = []
        self._set(settings)

    @property
    def all(self) -> list[Model]:
        """Every model, the one that a move begins with, and those that left with an engine."""
        return [*self.models.values(), *self._seconds, *self._leaving]

    def reload(self, settings: Settings) -> Difference:
        """Go by a new file; models that are gone drain and end, changed ones end when idle."""
        found = difference(self.settings, settings)
        self.settings = settings
        for name in found.removed:
            if (model := self.models.pop(name, None)) is not None:
                self._leave(model, "it is not in the file any more")
        for name in found.changed:
            if name in self.models and self.models[name].state is not State.COLD:
                self.stale.add(name)
        self._set(settings)
        return found

    def end_stale(self) -> list[str]:
        """End engines that are stale and idle; return whose end is to be followed by a start."""
        ended = []
        for name in list(self.stale):
            model = self.models.get(name)
            if model is not None and model.state in {State.WARM, State.YIELDED}:
                model.stop("the file says something else of it now")
                ended.append(name)
            if model is None or model.state not in UP | {State.STARTING}:
                self.stale.discard(name)
        return ended

    def second(self, model: Model) -> Model:
        """Return another object of a model, for a move; it is to be switched to, or dropped."""
        second = self._make(model.settings)
        self._seconds.add(second)
        return second

    def switch(self, model: Model) -> None:
        """Put a model's second object in the place of the first, which drains and ends."""
        self._seconds.discard(model)
        first = self.models.get(model.id)
        if first is None:  # a reload took it out meanwhile
            self._leave(model, "it is not in the file any more")
            return
        self.models[model.id] = model
        model.set_settings(first.settings, first.adapter_folders)
        self._leave(first, f"it has moved to {', '.join(model.devices)}")

    def drop(self, model: Model) -> None:
        """End a second object that took nobody's place."""
        self._seconds.discard(model)
        self._leave(model, "its move came to nothing")

    async def adopt(self, *, is_adopting: bool = True) -> int:
        """Take over what an earlier gateway left, and end what is not the file's; say how many.

        Args:
            is_adopting: Whether anything is taken over; else all of it is ended.
        """
        try:
            records = self._folder.read()
        except StateFileError as error:
            _log.warning("%s", error)
            records = []
        lost = [
            *(one.identity for one in records if not (is_adopting and self._adopt(one))),
            *await asyncio.to_thread(
                orphans, self._folder.path, [record.identity for record in records]
            ),
        ]
        await asyncio.gather(
            *(kill_session(identity) for identity in lost),
            *(model.settled() for model in self.models.values()),
        )
        return sum(model.state in UP for model in self.models.values())

    def write(self) -> None:
        """Write down what runs; a failure is only said, since nothing is lost by it yet."""
        records = (model.record() for model in self.all)
        try:
            self._folder.write(record for record in records if record is not None)
        except OSError as error:
            _log.warning("what runs cannot be written down; no engine could be adopted: %s", error)

    def log_of(self, model: Model) -> str:
        """Return the file that a model's engine writes to, or wrote to; nothing where none did."""
        if (record := model.record()) is not None:
            return record.log
        last = self._folder.logs / f"{model.settings.instance_name}.log"
        return str(last) if last.exists() else ""

    async def close(self, *, is_kept: bool, drain_seconds: float) -> None:
        """End every model's task, and its engine unless it is kept.

        What is kept is written down before the first one is left, and not any more.
        """
        self.write()
        self._is_kept = is_kept
        await asyncio.gather(
            *(model.close(is_kept=is_kept, drain_seconds=drain_seconds) for model in self.all)
        )

    def _adopt(self, record: EngineRecord) -> bool:
        """Return whether a record is of a model of the file that has none yet."""
        model = self.models.get(record.model_id)
        if model is None or model.settings.is_remote or model.readiness is not Readiness.COLD:
            return False
        model.adopt(record)
        return True

    def _set(self, settings: Settings) -> None:
        """Have an object for each model, in the file's order, with what the file says of it."""
        before = dict(self.models)
        self.models.clear()
        for name, each in settings.models.items():
            if each.is_adapter:
                continue
            model = before.get(name)
            if model is None:
                self.models[name] = self._make(each)
            else:
                self.models[name] = model
                model.set_settings(each, _adapters(settings, name))

    def _make(self, settings: ModelSettings) -> Model:
        runner = _Remote() if settings.is_remote else self._runner
        model = Model(settings, runner, _adapters(self.settings, settings.id), self._patience)
        model.on_change.append(self._changed)
        model.on_lease.append(self._tell_lease)
        return model

    def _leave(self, model: Model, reason: str) -> None:
        """Drain and end a model that is nobody's any more."""
        self._leaving.add(model)
        model.stop(reason)
        task = asyncio.ensure_future(model.close(is_kept=False, drain_seconds=None))
        task.add_done_callback(lambda _task: self._leaving.discard(model))

    def _changed(self, model: Model, before: State, after: State, reason: str) -> None:
        comes, is_gone = after in UP and before not in UP, after in GONE
        if (comes or is_gone) and not self._is_kept:
            self.write()
        for tell in self.on_change:
            tell(model, before, after, reason)

    def _tell_lease(self, model: Model) -> None:
        for tell in self.on_lease:
            tell(model)


class _Remote:
    """What "starts" a model that is served elsewhere; an `EngineRunner`."""

    async def start(
        self, settings: ModelSettings, devices: tuple[str, ...], token: str
    ) -> RunningEngine:
        """See `EngineRunner.start`."""
        del devices, token
        return await find_remote(settings)

    async def adopt(self, settings: ModelSettings, record: EngineRecord) -> RunningEngine:
        """Never called: no record is written of it."""
        del record
        return await find_remote(settings)


def _adapters(settings: Settings, base: str) -> Mapping[str, str]:
    """Return the folders of a model's adapters, by each name that a client may write."""
    return {
        name: str(each.path)
        for each in settings.models.values()
        if each.adapter_of == base
        for name in (each.id, *each.aliases)
    }
