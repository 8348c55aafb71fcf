"""A model that is served elsewhere (`url:`): asked and watched, never started or stopped."""

import asyncio
import os
from collections.abc import Mapping
from contextlib import AsyncExitStack

import aiohttp

from kvcached_gateway.engines.state_file import EngineRecord
from kvcached_gateway.engines.words import Counters
from kvcached_gateway.errors import EngineDiedError, EngineStartError
from kvcached_gateway.lease import Address
from kvcached_gateway.settings.config import ModelSettings

__all__ = ["RemoteEngine", "find_remote"]

ASK_SECONDS = 5.0
OK = 200
NOTHING = Counters(0, 0, 0, 0, 0)


class RemoteEngine:
    """An engine of somebody else; a `protocols.RunningEngine` without a process.

    Args:
        address: Where it listens, with its key.
    """

    token = ""
    max_adapters = 0

    def __init__(self, address: Address) -> None:
        self.address = address
        self._ended = asyncio.Event()
        self._session = aiohttp.ClientSession(address.url, headers=dict(address.headers))

    def serves(self, name: str) -> bool:
        """Return that it does: what it calls its model, it says itself."""
        del name
        return True

    def record(self) -> EngineRecord | None:
        """Return nothing: a later gateway finds it in the file again."""
        return None

    async def ended(self) -> None:
        """Wait until we leave it: when it goes away, its health says so."""
        await self._ended.wait()

    async def end(self, grace_seconds: float, *, is_hung: bool = False) -> str:
        """Leave it; it is not ours to end."""
        del grace_seconds, is_hung
        await self.leave()
        return "it is not ours, and goes on"

    async def leave(self) -> None:
        """See `RunningEngine.leave`."""
        self._ended.set()
        await self._session.close()

    async def health(self, seconds: float) -> bool:
        """Return whether it answers."""
        try:
            await self.names(seconds)
        except EngineDiedError:
            return False
        return True

    async def counters(self) -> Counters:
        """Return nothing: what it computes takes no memory of ours."""
        return NOTHING

    async def load_adapter(self, name: str, path: str) -> None:
        """Refuse: whoever started it loads its adapters.

        Raises:
            EngineStartError: Always.
        """
        raise EngineStartError(f"the adapter {name!r} ({path}) is not loaded into a remote model")

    async def unload_adapter(self, name: str) -> None:
        """Do nothing: none was loaded."""

    async def names(self, seconds: float = ASK_SECONDS) -> frozenset[str]:
        """Return the names of its models.

        Raises:
            EngineDiedError: If it does not say so within `seconds`.
        """
        limit = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.get(
                "v1/models", timeout=limit, allow_redirects=False
            ) as answer:
                if answer.status != OK:
                    raise EngineDiedError(f"{self.address.url} answers {answer.status}")
                found = await answer.json()
                return frozenset(str(each["id"]) for each in found["data"])
        except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError) as error:
            what = str(error) or type(error).__name__
            raise EngineDiedError(f"{self.address.url} does not answer: {what}") from error


async def find_remote(
    settings: ModelSettings, environ: Mapping[str, str] = os.environ
) -> RemoteEngine:
    """Return the engine behind a model's `url:`, if it answers and has the model.

    Raises:
        EngineStartError: If not.
    """
    key = environ.get(settings.key_env) if settings.key_env else None
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    engine = RemoteEngine(Address(str(settings.url), headers=headers))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.leave)  # a start that is cancelled leaves nothing either
        try:
            names = await engine.names()
        except EngineDiedError as error:
            raise EngineStartError(str(error)) from error
        if settings.id not in names:
            found = ", ".join(sorted(names)) or "nothing"
            raise EngineStartError(f"{settings.url} serves {found}, and no {settings.id!r}")
        stack.pop_all()
    return engine
