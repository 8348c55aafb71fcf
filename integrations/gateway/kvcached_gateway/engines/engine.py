"""One live engine: its words, its processes, its address, and what we ask it ourselves.

Requests of clients go past this: the proxy has sessions of its own.
"""

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

from kvcached_gateway.engines.last_words import cause, log_end
from kvcached_gateway.engines.process import EngineProcess
from kvcached_gateway.engines.state_file import EngineRecord
from kvcached_gateway.engines.words import Counters, EngineWords
from kvcached_gateway.errors import EngineDiedError, EngineStartError
from kvcached_gateway.lease import Address
from kvcached_gateway.settings.config import ModelSettings

__all__ = ["Engine"]

ASK_SECONDS = 5.0
NAMES_SECONDS = 30.0  # an adoption asks: an engine that is only slow must not be ended
LOAD_SECONDS = 120.0
READY_LOOK_SECONDS = 0.1
LISTENING = "0A"  # a state in /proc/net/tcp
ADDRESS, STATE, USER = 1, 3, 7  # its columns
OK = 200


class Engine:
    """A live engine.

    Args:
        words: How it is spoken to.
        settings: The model that it was started for.
        process: Its processes.
        record: What a later gateway needs to adopt it; its token may not be known yet.

    Attributes:
        is_gone: Whether it was ended to the last process, or left: its files are nobody's.
    """

    def __init__(
        self,
        words: EngineWords,
        settings: ModelSettings,
        process: EngineProcess,
        record: EngineRecord,
    ) -> None:
        self.words = words
        self.settings = settings
        self.process = process
        self.is_gone = False
        self._record = record
        address = record.address
        connector = aiohttp.UnixConnector(address.socket) if address.socket else None
        headers = {**address.headers, "Accept-Encoding": "identity"}
        self._session = aiohttp.ClientSession(address.url, connector=connector, headers=headers)

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self._record.address

    @property
    def devices(self) -> tuple[str, ...]:
        """Where it runs, in the ledger's words."""
        return self._record.devices

    @property
    def log(self) -> Path:
        """The file that it writes to."""
        return Path(self._record.log)

    @property
    def token(self) -> str:
        """What it answered to the known question; nothing before it was asked."""
        return self._record.token

    @property
    def max_adapters(self) -> int:
        """How many adapters it keeps."""
        return self._record.max_adapters

    def serves(self, name: str) -> bool:
        """Return whether it calls its model so: as the file said when it was started."""
        return self.words.serves(self.settings, name)

    def record(self) -> EngineRecord:
        """Return what a later gateway needs to adopt it."""
        return self._record

    async def ready(self) -> None:
        """Wait until it says that it is up; whoever calls sets the limit.

        Raises:
            EngineStartError: If it ends before.
        """
        ended = asyncio.ensure_future(self.process.ended())
        try:
            while not await self._is_up():
                await asyncio.wait([ended], timeout=READY_LOOK_SECONDS)
                if ended.done():
                    how = how_it_ended(self.process.exit_code)
                    raise EngineStartError(f"the engine {how} while it started")
        finally:
            ended.cancel()

    async def verify(self) -> str:
        """Ask for one token, or one vector, and return it; a token known before has to come again.

        Raises:
            EngineStartError: If there is no answer, or another one.
        """
        question = self.words.question(self.settings)
        try:
            status, body = await self._ask(
                "POST", question.path, question.body, self.settings.start_limit_seconds
            )
        except EngineDiedError as error:
            raise EngineStartError(f"{self.settings.id!r} does not compute: {error}") from error
        if status != OK:
            text = body[:200].decode(errors="replace")
            raise EngineStartError(f"{self.settings.id!r} answered {status} to one token: {text}")
        answer = self.words.answer(body)
        if self.token and not self.words.is_same(answer, self.token, self.settings):
            raise EngineStartError(
                f"{self.settings.id!r} answers {answer[:80]!r} where it answered "
                f"{self.token[:80]!r} before: its weights are not what they were"
            )
        self._record = replace(self._record, token=self.token or answer)
        return self.token

    async def health(self, seconds: float = ASK_SECONDS) -> bool:
        """Return whether it says within `seconds` that it is well."""
        with suppress(EngineDiedError):
            return (await self._ask("GET", self.words.health_path, None, seconds))[0] == OK
        return False

    async def counters(self) -> Counters:
        """Return what it says of its work.

        Raises:
            EngineDiedError: If it does not answer.
        """
        _, body = await self._ask("GET", self.words.metrics_path, None, ASK_SECONDS)
        return self.words.read_counters(body.decode())

    async def served_names(self) -> frozenset[str]:
        """Return the names that it answers to.

        Raises:
            EngineDiedError: If it does not answer.
        """
        _, body = await self._ask("GET", "/v1/models", None, NAMES_SECONDS)
        return self.words.served_names(body)

    async def load_adapter(self, name: str, path: str) -> None:
        """Load an adapter; one that it has already is no error.

        Raises:
            EngineStartError: If it cannot.
            EngineDiedError: If it does not answer.
        """
        asked = {"lora_name": self.words.adapter_name(self.settings, name), "lora_path": path}
        status, body = await self._ask("POST", self.words.load_path, asked, LOAD_SECONDS)
        text = body[:300].decode(errors="replace")
        if status != OK and "already" not in text:
            raise EngineStartError(f"the adapter {name!r} cannot be loaded: {status} {text}")

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter; one that it does not have is no error.

        Raises:
            EngineDiedError: If it does not answer.
        """
        asked = {"lora_name": self.words.adapter_name(self.settings, name)}
        await self._ask("POST", self.words.unload_path, asked, LOAD_SECONDS)

    async def ended(self) -> None:
        """Wait until its first process has ended."""
        await self.process.ended()

    async def end(self, grace_seconds: float, *, is_hung: bool = False) -> str:
        """End it to the last process: politely, or with stacks in its log where it hangs.

        Returns:
            How its first process ended, and why, as its log says.

        Raises:
            TimeoutError: If one of its processes is still there.
        """
        if is_hung:
            await self.process.abort(grace_seconds)
        else:
            await self.process.end(grace_seconds)
        await self._session.close()
        if self.address.socket:
            remove(self.address.socket)
        self.is_gone = True
        text = log_end(self.log)
        last = cause(text) or text.rpartition("\n")[2]
        return f"{how_it_ended(self.process.exit_code)}; its log ends with {last!r}"

    async def leave(self) -> None:
        """Leave it alone, alive, for a gateway that comes later."""
        self.process.forget()
        await self._session.close()
        self.is_gone = True

    async def _is_up(self) -> bool:
        if not self.address.socket and not _is_ours(int(self.address.url.rpartition(":")[2])):
            return False
        with suppress(EngineDiedError):
            return (await self._ask("GET", self.words.ready_path, None, ASK_SECONDS))[0] == OK
        return False

    async def _ask(self, method: str, path: str, body: Any, seconds: float) -> tuple[int, bytes]:
        """Return the status and the body of an answer.

        Raises:
            EngineDiedError: If there is none within `seconds`.
        """
        limit = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.request(
                method, path, json=body, timeout=limit, allow_redirects=False
            ) as answer:
                return answer.status, await answer.read()
        except (aiohttp.ClientError, OSError) as error:  # a time-out is an OSError
            what = str(error) or type(error).__name__
            raise EngineDiedError(f"{self.settings.id!r} does not answer {path}: {what}") from error


def remove(file: str) -> None:
    """Remove a file, such as the socket of an engine that was killed."""
    Path(file).unlink(missing_ok=True)


def how_it_ended(exit_code: int | None) -> str:
    """Return how a process ended, in words."""
    if exit_code is None:
        return "has ended"
    if exit_code < 0:
        return f"was ended by {signal.Signals(-exit_code).name}"
    return f"ended with {exit_code}"


def _is_ours(port: int) -> bool:
    """Return whether a process of our user listens on a port of the loopback.

    An engine listens minutes after its port was chosen. Before it does, somebody else could, and
    would be told its key.
    """
    wanted = f"0100007F:{port:04X}"
    with Path("/proc/net/tcp").open() as table:
        for line in table:
            words = line.split()
            if words[ADDRESS] == wanted and words[STATE] == LISTENING:
                return int(words[USER]) == os.getuid()
    return False
