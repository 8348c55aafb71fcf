"""A gateway from its start to its end: what there is, put together in one place."""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from kvcached_core.errors import ConfigError
from kvcached_gateway.admin.events import Events
from kvcached_gateway.admin.metrics import Metrics
from kvcached_gateway.admin.views import Decision, status_rows
from kvcached_gateway.control.controller import Controller
from kvcached_gateway.control.draining import drain
from kvcached_gateway.control.machine import Machine, MachineView
from kvcached_gateway.control.sizes import Sizes
from kvcached_gateway.control.steering import Gateway
from kvcached_gateway.engines.process import Launch, launch
from kvcached_gateway.engines.runner import Runner, max_tokens
from kvcached_gateway.engines.state_file import Folder
from kvcached_gateway.http.door import allow_files
from kvcached_gateway.http.front import Front
from kvcached_gateway.http.limits import LimitedLeases
from kvcached_gateway.line.line import Line
from kvcached_gateway.listening import Listen, listen_for_admin, listen_for_all
from kvcached_gateway.models.fleet import Fleet
from kvcached_gateway.models.model import Model
from kvcached_gateway.models.watch import Patience
from kvcached_gateway.settings.config import Settings
from kvcached_gateway.settings.config_file import read_settings
from kvcached_gateway.settings.keys import KeysFile
from kvcached_gateway.state import UP, State

__all__ = ["Serving", "run", "serve", "serving"]

DRAIN_SECONDS = 30.0

_log = logging.getLogger(__name__)


class Serving:
    """A gateway that serves.

    Attributes:
        gateway: What steers it.
        fleet: Its models.
        controller: What decides.
        port: Where it listens.
        num_adopted: How many engines of an earlier gateway it has.
    """

    def __init__(
        self, gateway: Gateway, fleet: Fleet, controller: Controller, port: int, num_adopted: int
    ) -> None:
        self.gateway = gateway
        self.fleet = fleet
        self.controller = controller
        self.port = port
        self.num_adopted = num_adopted


@asynccontextmanager
async def serving(
    file: Path,
    directory: Path,
    *,
    is_adopting: bool = True,
    environ: Mapping[str, str] = os.environ,
    patience: Patience | None = None,
    launch: Launch = launch,
    listen: Listen = listen_for_all,
) -> AsyncIterator[Serving]:
    """Serve a file of models inside a block; behind it nothing is left, but what is to be kept.

    Args:
        file: The file.
        directory: The folder of the ledgers, in which the gateway has one of its own.
        is_adopting: Whether engines of an earlier gateway are taken over; else they are ended.
        environ: The variables of the gateway.
        patience: How long engines are waited for.
        launch: What starts a program.
        listen: What opens the public port.

    Raises:
        ConfigError: If the file has a mistake.
        GatewayRunningError: If another gateway serves from the folder.
    """
    settings = read_settings(file, environ)
    # Engines run in another folder than this process.
    directory = directory.absolute()  # noqa: ASYNC240  it opens nothing
    machine = Machine(directory, settings.devices, settings.host_memory_bytes)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(Folder(directory))
        fleet = _fleet(settings, folder, directory, environ, patience, launch)
        keys_file = settings.keys_file
        keys = None if keys_file is None else KeysFile(keys_file, lambda: fleet.settings)
        sizes, events = Sizes(lambda model: max_tokens(model, fleet.settings)), Events()
        loop = asyncio.get_running_loop()
        controller = Controller(fleet, directory, partial(_look, machine, fleet, environ), sizes)
        line = Line(
            fleet.models,
            lambda: fleet.settings,
            loop.time,
            controller.wanted,
            controller.hindrance,
            controller.held,
        )
        controller.follow(line)

        def read() -> Settings:
            try:
                new = read_settings(file, environ)
                if keys is not None:
                    keys.keys.check(new)
            except ConfigError:
                metrics.reload_failed()
                raise
            return new

        gateway = Gateway(fleet, line, controller, directory, read, events)
        metrics = Metrics(lambda: fleet.settings, gateway.models, gateway.devices)
        line.on_late.append(metrics.late)
        fleet.on_lease.append(lambda model: line.changed(model.id))
        fleet.on_change += [
            controller.changed,
            lambda model, _before, _after, _why: line.changed(model.id),
            partial(_tell, metrics, events),
        ]
        controller.decisions.on_add.append(partial(_count, metrics, events))
        num_adopted = await fleet.adopt(is_adopting=is_adopting)
        for _ in range(num_adopted):
            metrics.adopted()
        stack.push_async_callback(_end, fleet)
        deciding = asyncio.ensure_future(controller.run())
        stack.callback(deciding.cancel)
        if keys is not None:
            stack.callback(asyncio.ensure_future(keys.follow()).cancel)
        front = Front(
            leases=line if keys is None else LimitedLeases(line, keys.named, loop.time),
            settings=lambda: fleet.settings,
            keys=lambda: None if keys is None else keys.keys,
            status=partial(_status, gateway),
            exposition=partial(_exposition, metrics),
            observe=metrics,
            is_ready=lambda: not gateway.is_draining,
        )
        await listen_for_admin(stack, gateway, directory)
        port = await listen(stack, front, gateway)
        stack.push_async_callback(_drain, gateway, fleet, line)
        gateway.listen = f"{settings.listen.rpartition(':')[0]}:{port}"
        yield Serving(gateway, fleet, controller, port, num_adopted)


async def serve(file: Path, directory: Path, *, is_adopting: bool = True) -> None:
    """Serve a file of models until SIGTERM or SIGINT; SIGHUP reads the file again.

    See `serving` for arguments and errors.
    """
    loop = asyncio.get_running_loop()
    async with serving(file, directory, is_adopting=is_adopting) as here:
        reloads: set[asyncio.Task[None]] = set()

        def reload() -> None:
            task = loop.create_task(_reload(here.gateway))
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        loop.add_signal_handler(signal.SIGHUP, reload)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, here.gateway.drain)
        _log.info(
            "%d models at http://%s/v1, %d of them adopted",
            len(here.fleet.settings.models),
            here.gateway.listen,
            here.num_adopted,
        )
        await here.gateway.drained.wait()


def run(settings: Settings, directory: Path, is_adopting: bool) -> int:  # noqa: FBT001  a flag
    """Serve a file of models, as `kvcached serve` does, and return the exit code.

    See `serving` for errors.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    allow_files()
    uvloop.run(serve(settings.path, directory, is_adopting=is_adopting))
    return 0


def _fleet(
    settings: Settings,
    folder: Folder,
    directory: Path,
    environ: Mapping[str, str],
    patience: Patience | None,
    launch: Launch,
) -> Fleet:
    secrets = {each.key_env for each in settings.models.values() if each.key_env}
    runner = Runner(
        folder,
        directory,
        lambda: fleet.settings.environments,
        {name: value for name, value in environ.items() if name not in secrets},
        settings.path.parent,
        launch,
    )
    fleet = Fleet(settings, runner, folder, patience)
    return fleet


async def _look(machine: Machine, fleet: Fleet, environ: Mapping[str, str]) -> MachineView:
    """Look at the machine beside the loop."""
    environs = environ, *(each.env for each in fleet.settings.environments.values())
    records = [(model.id, model.record()) for model in fleet.all]
    engines = [(name, record.identity) for name, record in records if record is not None]
    return await asyncio.to_thread(machine.look, engines, environs)


async def _status(gateway: Gateway) -> list[dict[str, Any]]:
    return status_rows(gateway.models())


async def _exposition(metrics: Metrics) -> str:
    return metrics.exposition()


def _tell(
    metrics: Metrics, events: Events, model: Model, before: State, after: State, reason: str
) -> None:
    """Count a transition, and tell whoever listens."""
    metrics.changed(model.id, before, after)
    if before is State.STARTING and after in UP and model.last_start_seconds is not None:
        metrics.started(model.id, model.last_start_seconds)
    events.publish({"model": model.id, "from": str(before), "to": str(after), "reason": reason})


def _count(metrics: Metrics, events: Events, decision: Decision) -> None:
    """Count a decision, and tell whoever listens."""
    if decision.verb == "stop":
        metrics.evicted(decision.model_id, "start" if decision.inputs else "idle")
    elif decision.verb == "move":
        metrics.moved(decision.model_id)
    events.publish(asdict(decision))


async def _reload(gateway: Gateway) -> None:
    """Read the file again, as a signal says; a mistake is only said."""
    try:
        _log.info("%s", await gateway.reload())
    except ConfigError as error:
        _log.error("the file of before holds on: %s", error)


async def _drain(gateway: Gateway, fleet: Fleet, line: Line) -> None:
    gateway.drain()
    await drain(fleet, line, DRAIN_SECONDS)


async def _end(fleet: Fleet) -> None:
    """End the models' tasks, with their engines unless those are kept."""
    is_kept = fleet.settings.engines_on_exit == "keep"
    await fleet.close(is_kept=is_kept, drain_seconds=DRAIN_SECONDS)
    if not is_kept:  # what is kept was written down before it was left
        fleet.write()
