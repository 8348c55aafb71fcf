"""The adapters that one engine has: loaded at the first request, unloaded when least used."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from kvcached_core.errors import KVCachedError

__all__ = ["Adapters"]

_log = logging.getLogger(__name__)
RETRY_SECONDS = 30.0


class AdapterEngine(Protocol):
    """What is asked of an engine."""

    async def load_adapter(self, name: str, path: str) -> None:
        """Load one."""

    async def unload_adapter(self, name: str) -> None:
        """Unload one."""


class Adapters:
    """The adapters of an engine that runs.

    Args:
        engine: The engine.
        max_loaded: How many it keeps.
        num_leases: Says how many requests use an adapter now: such a one stays.
        changed: Called when one was loaded, or could not be.
    """

    def __init__(
        self,
        engine: AdapterEngine,
        max_loaded: int,
        num_leases: Callable[[str], int],
        changed: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._max_loaded = max_loaded
        self._num_leases = num_leases
        self._changed = changed
        self._loaded: OrderedDict[str, None] = OrderedDict()  # the least used first
        self._failed_at: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None
        self._loading = ""

    @property
    def loaded(self) -> tuple[str, ...]:
        """Those that it has, the least used first."""
        return tuple(self._loaded)

    def is_loading(self, name: str) -> bool:
        """Whether the engine is loading one right now."""
        return self._task is not None and self._loading == name

    def may_ask(self, name: str, path: str) -> bool:
        """Return whether a request for an adapter can go to the engine now.

        If it is not there, it is loaded, one after the other. Where that fails, the engine itself
        answers that it has none of this name, and it is tried again later.
        """
        if name in self._loaded:
            self._loaded.move_to_end(name)
            return True
        now = asyncio.get_running_loop().time()
        if now - self._failed_at.get(name, -RETRY_SECONDS) < RETRY_SECONDS:
            return True
        if self._task is None and self._victim() is not False:
            self._loading = name
            self._task = asyncio.create_task(self._load(name, path))
        return False

    def close(self) -> None:
        """Load nothing any more."""
        if self._task is not None:
            self._task.cancel()

    def _victim(self) -> str | bool:
        """Return who goes for another: a name, True where nobody has to, False where none may."""
        if len(self._loaded) < self._max_loaded:
            return True
        return next((name for name in self._loaded if not self._num_leases(name)), False)

    async def _load(self, name: str, path: str) -> None:
        try:
            victim = self._victim()
            if isinstance(victim, str):
                del self._loaded[victim]
                await self._engine.unload_adapter(victim)
            await self._engine.load_adapter(name, path)
            self._loaded[name] = None
        except KVCachedError as error:
            self._failed_at[name] = asyncio.get_running_loop().time()
            _log.warning("%s", error)
        finally:
            self._task = None
        self._changed()
