"""A line over models without engines, for tests on a simulated loop."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.gateway_clock import run_simulated
from helpers.gateway_models import FakeGrantor
from kvcached_gateway.errors import RefusedError
from kvcached_gateway.lease import Ask, Ending, Lease
from kvcached_gateway.line.grantor import Readiness
from kvcached_gateway.line.line import Line
from kvcached_gateway.settings.config import ModelSettings, ServiceClass, Settings


class World:
    """A line over models, and who was wanted."""

    def __init__(self, *models: FakeGrantor, **settings: Any) -> None:
        self.models = {model.id: model for model in models}
        self.set_settings(*(ModelSettings(id=name, **settings) for name in "abc"))
        self.wanted: list[str] = []
        self.held: dict[str, str] = {}
        self.line = Line(
            self.models,
            lambda: self.settings,
            asyncio.get_running_loop().time,
            self.wanted.append,
            lambda model_id: f"c holds what {model_id} needs",
            lambda model_id: self.held.get(model_id, ""),
        )

    def set_settings(self, *models: ModelSettings, **classes: ServiceClass) -> None:
        by_id = {model.id: model for model in models}
        self.settings = Settings(path=Path("models.yaml"), models=by_id, classes=classes)

    def put(self, model: str, **settings: Any) -> None:
        """Say something else of one model in the file."""
        models = self.settings.models | {model: ModelSettings(id=model, **settings)}
        self.settings = self.settings.model_copy(update={"models": models})

    def start(self, model: str = "a", **more: Any) -> asyncio.Task[Lease]:
        return asyncio.create_task(self.line.take(ask(model, **more)))

    def end(self, model: str, index: int = 0) -> None:
        self.models[model].leases[index].end(Ending.DONE)
        self.line.changed(model)

    def set(self, model: str, readiness: Readiness) -> None:
        self.models[model].readiness = readiness
        self.line.changed(model)


def ask(model: str = "a", key: str | None = None, body_bytes: int = 100, **more: Any) -> Ask:
    return Ask(model, "/v1/completions", body_bytes, key=key, **more)


def simulated(test: Callable[..., Awaitable[None]]) -> Callable[[], None]:
    """Run a test's coroutine on a simulated loop."""

    def run() -> None:
        run_simulated(test)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def refused(task: asyncio.Task[Lease]) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        await task
    return caught.value
