"""Starting engines as the file says, and knowing whether one that runs is as the file says."""

import asyncio
import os
import secrets
from collections.abc import Callable, Mapping
from itertools import chain, count
from pathlib import Path

from kvcached_gateway.engines.adoption import check, identify
from kvcached_gateway.engines.engine import Engine, remove
from kvcached_gateway.engines.last_words import cause, log_end
from kvcached_gateway.engines.process import Launch, launch, start
from kvcached_gateway.engines.sessions import MARK, kill_session
from kvcached_gateway.engines.sglang import SglangWords
from kvcached_gateway.engines.starving import fed
from kvcached_gateway.engines.state_file import EngineRecord, Folder
from kvcached_gateway.engines.vllm import VllmWords
from kvcached_gateway.engines.words import EngineWords
from kvcached_gateway.errors import AdoptionError, EngineDiedError, EngineStartError
from kvcached_gateway.settings.config import Environment, ModelSettings, Settings
from kvcached_gateway.settings.reload import engine_digest

__all__ = ["WORDS", "Runner", "max_tokens"]

WORDS: Mapping[str, EngineWords] = {words.name: words for words in (VllmWords(), SglangWords())}
ADOPT_SECONDS = 30.0  # weights that yielded come back first, one model's after the other
NUM_BYTES = 3
TAIL_LINES = 12


class Runner:
    """Starts and adopts engines; a `protocols.EngineRunner`.

    Args:
        folder: The gateway's folder.
        directory: `KVCACHED_DIR`, the folder of the ledgers.
        environments: The file's `environments:`, as they are now.
        environ: The variables that every engine has, without anybody's secrets.
        home: Where engines run: paths of models in the file begin there.
        launch: What starts a program.
    """

    def __init__(
        self,
        folder: Folder,
        directory: Path,
        environments: Callable[[], Mapping[str, Environment]],
        environ: Mapping[str, str],
        home: Path,
        launch: Launch = launch,
    ) -> None:
        self._folder = folder
        self._directory = directory
        self._environments = environments
        self._environ = dict(environ)
        self._home = home
        self._launch = launch
        self._engines: dict[str, Engine] = {}

    async def start(self, settings: ModelSettings, devices: tuple[str, ...], token: str) -> Engine:
        """See `EngineRunner.start`."""
        environment = self._environment(settings)
        words = WORDS[environment.engine]
        name = settings.instance_name
        # While a model moves it has two engines, and one that was killed leaves its socket.
        own = f"{name}-{secrets.token_hex(NUM_BYTES)}"
        stem = self._free_stem(name)
        keys, log = self._folder.engines / f"{own}.yaml", self._folder.logs / f"{stem}.log"
        address = words.address(self._folder.engines, own)
        command = words.command(settings, environment, devices, address, keys)
        variables = words.environ(settings, environment, devices)
        try:
            _rotate(log)
            _write_key(keys, words.key_file(address))
            process = start(
                command,
                self._environ | variables | self._own(),
                log=log,
                folder=self._home,
                launch=self._launch,
            )
        except OSError as error:
            keys.unlink(missing_ok=True)
            raise EngineStartError(f"{settings.id!r} cannot be started: {error}") from error
        record = EngineRecord(
            model_id=settings.id,
            engine=words.name,
            identity=process.identity,
            address=address,
            devices=devices,
            digest=engine_digest(settings, environment),
            instance_name=settings.instance_name,
            is_elastic=variables["ENABLE_KVCACHED"] != "0",
            log=str(log),
            max_adapters=words.max_adapters(command),
            token=token,
        )
        engine = self._engines[stem] = Engine(words, settings, process, record)
        try:
            await self._bring_up(engine)
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(engine.end(0.0)))
            raise
        finally:
            keys.unlink(missing_ok=True)
        return engine

    async def adopt(self, settings: ModelSettings, record: EngineRecord) -> Engine:
        """See `EngineRunner.adopt`."""
        try:
            self._check_digest(settings, record)
            process = await identify(record, self._directory)
        except (AdoptionError, EngineStartError) as error:
            await kill_session(record.identity)
            if record.address.socket:
                remove(record.address.socket)
            raise AdoptionError(
                f"the engine of {record.model_id!r} that an earlier gateway left was ended: {error}"
            ) from error
        engine = Engine(WORDS[record.engine], settings, process, record)
        self._engines[Path(record.log).stem] = engine
        try:
            async with asyncio.timeout(ADOPT_SECONDS):
                await check(engine)
        except (AdoptionError, EngineStartError, EngineDiedError, TimeoutError) as error:
            how = str(error) or f"it did not answer within {ADOPT_SECONDS:g} s"
            await engine.end(0.0)
            raise AdoptionError(
                f"the engine of {record.model_id!r} that an earlier gateway left was ended: {how}"
            ) from error
        return engine

    async def _bring_up(self, engine: Engine) -> None:
        """Wait until an engine is up and answers as it should.

        Raises:
            EngineStartError: If it does not; with the end of its log.
        """
        limit = engine.settings.start_limit_seconds
        try:
            async with asyncio.timeout(limit):
                await engine.ready()
                await fed(engine.verify(), engine.log)
        except (EngineStartError, TimeoutError) as error:
            why = str(error) or f"the engine was not up within its start_limit of {limit:g} s"
            text = log_end(engine.log)
            found = cause(text)
            tail = "\n".join(text.splitlines()[-TAIL_LINES:])
            says_so = any(words in f"{found}\n{tail}" for words in engine.words.out_of_memory)
            is_short = isinstance(error, EngineStartError) and error.is_out_of_memory
            raise EngineStartError(
                f"{found + '; ' if found else ''}{why}\nIts log ends with:\n{tail}",
                is_out_of_memory=is_short or says_so,
            ) from error

    def _free_stem(self, instance_name: str) -> str:
        """Return a name for the files of a new engine that no other engine's files have.

        While a model moves it has two, and one that a reload took out may still be at its end when
        it is in the file again.
        """
        self._engines = {stem: one for stem, one in self._engines.items() if not one.is_gone}
        stems = (f"{instance_name}.{number}" for number in count(2))
        return next(stem for stem in chain([instance_name], stems) if stem not in self._engines)

    def _check_digest(self, settings: ModelSettings, record: EngineRecord) -> None:
        if record.digest != engine_digest(settings, self._environment(settings)):
            raise AdoptionError("it was started with other settings than the file has now")

    def _environment(self, settings: ModelSettings) -> Environment:
        """Return where a model's engine is.

        Raises:
            EngineStartError: If the file has no such environment any more.
        """
        environment = self._environments().get(settings.environment or "")
        if environment is None:
            raise EngineStartError(f"there is no environment {settings.environment!r} in the file")
        return environment

    def _own(self) -> dict[str, str]:
        return {"KVCACHED_DIR": str(self._directory), MARK: str(self._folder.path)}


def max_tokens(model: ModelSettings, settings: Settings) -> int | None:
    """Return how many tokens a request may have, by its engine's arguments; None: none says it."""
    environment = settings.environments.get(model.environment or "")
    if environment is None:
        return None
    return WORDS[environment.engine].max_tokens([*environment.args, *model.args])


def _rotate(log: Path) -> None:
    """Keep the log of the engine before."""
    if log.exists():
        log.replace(log.with_suffix(".log.1"))


def _write_key(file: Path, text: str | None) -> None:
    if text is not None:
        file.unlink(missing_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w") as opened:  # noqa: PTH123  a descriptor
            opened.write(text)
