"""Real engines come up, drain, die, hang and fail, and each time no process of them is left."""

import asyncio
import os
import signal
import stat
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from helpers.gateway_life import (
    HOST,
    QUICK,
    launch_warm,
    make_runner,
    settings_of,
    short_folder,
    warm_up,
)
from helpers.waiting import PATIENCE_SECONDS

from kvcached_demo.harness.model import make_model
from kvcached_gateway.engines.engine import Engine
from kvcached_gateway.engines.sessions import members
from kvcached_gateway.engines.state_file import Folder
from kvcached_gateway.errors import EngineStartError
from kvcached_gateway.lease import Address, Ask, Ending
from kvcached_gateway.models.held_leases import ModelLease
from kvcached_gateway.models.model import Model, State
from kvcached_gateway.settings.config import ModelSettings

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
PATH = "/v1/completions"
NUM_ANSWER_TOKENS = 300
ALIAS = "tiny"


class House:
    """A gateway's folder, its loop, and the models that were started in it."""

    def __init__(self, directory: Path, weights: Path) -> None:
        self.directory = directory
        self.weights = weights
        self.folder = Folder(directory)
        self.models: dict[str, Model] = {}
        self._runner = asyncio.Runner()

    def run(self, main: Callable[[], Awaitable[None]]) -> None:
        async def limited() -> None:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await main()

        self._runner.run(limited())

    def settings(self, model_id: str, **more: Any) -> ModelSettings:
        return settings_of(model_id, self.weights, aliases=(ALIAS,), **more)

    def model(self, settings: ModelSettings) -> Model:
        runner = make_runner(self.folder, self.directory, launch=launch_warm)
        model = self.models[settings.id] = Model(settings, runner, patience=QUICK)
        return model

    async def up(self, model_id: str, **more: Any) -> tuple[Model, Engine]:
        """Return a model whose engine is up, and the engine; it is started if it is not."""
        model = self.models.get(model_id) or self.model(self.settings(model_id, **more))
        model.start(HOST, "a test wants it")
        await model.settled()
        assert model.state is State.WARM, model.failure
        assert isinstance(model.engine, Engine)
        return model, model.engine

    def close(self) -> None:
        async def end() -> None:
            await asyncio.gather(*(model.close(is_kept=False) for model in self.models.values()))

        self._runner.run(end())
        self._runner.close()
        self.folder.close()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    weights = make_model(tmp_path_factory.mktemp("models") / "tiny", seed=1)
    warm_up("vllm", "sglang")
    with short_folder() as directory:
        opened = House(directory, weights)
        yield opened
        opened.close()


def take(model: Model) -> ModelLease:
    lease = model.grant(Ask(model.id, PATH, 100), 0.0)
    assert lease is not None
    return lease


class Stream:
    """An answer of an engine, as a client reads it."""

    def __init__(self, address: Address, model_id: str, *, is_stream: bool = True) -> None:
        connector = aiohttp.UnixConnector(address.socket) if address.socket else None
        self._session = aiohttp.ClientSession(
            address.url, connector=connector, headers=dict(address.headers)
        )
        self._body = {
            "model": model_id,
            "prompt": "memory follows the load",
            "max_tokens": NUM_ANSWER_TOKENS,
            "ignore_eos": True,
            "stream": is_stream,
        }

    async def post(self) -> aiohttp.ClientResponse:
        return await self._session.post(PATH, json=self._body)

    async def close(self) -> None:
        await self._session.close()

    async def __aenter__(self) -> aiohttp.ClientResponse:
        self._answer = await self.post()
        return self._answer

    async def __aexit__(self, *_: object) -> None:
        self._answer.close()
        await self.close()


def coming_to(model: Model, state: State) -> asyncio.Event:
    """Return what is set when a model comes to a state from now on."""
    came = asyncio.Event()
    model.on_change.append(lambda _model, _old, new, _why: came.set() if new is state else None)
    return came


def test_a_stop_waits_for_the_last_byte(house: House) -> None:
    async def main() -> None:
        model, live = await house.up("vllm")
        lease = take(model)
        async with Stream(lease.address, model.id) as answer:
            await answer.content.readany()
            lease.first_byte()
            draining = coming_to(model, State.DRAINING)
            model.stop("a test wants it gone")
            await draining.wait()
            assert model.grant(Ask(model.id, PATH, 100), 0.0) is None
            text = await answer.text()
        assert text.endswith("data: [DONE]\n\n")
        assert model.state is State.DRAINING
        lease.end(Ending.DONE)
        await model.settled()
        assert model.state is State.COLD
        assert members(live.process.identity) == []
        assert live.process.exit_code == 0
        assert not list(house.folder.engines.glob("*.sock"))

    house.run(main)


def test_an_engine_that_dies_leaves_nothing_and_is_tried_once_more_at_once(house: House) -> None:
    async def main() -> None:
        for is_answering, then in ((False, State.COLD), (True, State.FAILED)):
            model, live = await house.up("vllm")
            identity = live.process.identity
            lease = take(model)
            others = [pid for pid in members(identity) if pid != identity.pid]
            assert len(others) >= 2  # vLLM's core and worker would live on by themselves
            gone = coming_to(model, then)
            if is_answering:
                async with Stream(lease.address, model.id) as answer:
                    await answer.content.readany()
                    lease.first_byte()
                    os.kill(identity.pid, signal.SIGKILL)
                    with pytest.raises(aiohttp.ClientError):
                        await answer.read()
            else:
                for pid in others:
                    os.kill(pid, signal.SIGSTOP)  # so no byte comes
                stream = Stream(lease.address, model.id, is_stream=False)
                asking = asyncio.create_task(stream.post())
                await asyncio.wait([asking], timeout=0.5)
                os.kill(identity.pid, signal.SIGKILL)
                with pytest.raises(aiohttp.ClientError):
                    await asking
                await stream.close()
            await gone.wait()
            assert "ended by SIGKILL" in model.reason
            assert members(identity) == []
            assert model.num_leases == 0
            assert not lease.is_held
            lease.end(Ending.DIED_WITHIN)
        refusal = model.refusal()
        assert refusal is not None
        assert refusal.status == 503
        assert refusal.retry_after_seconds > 100  # it died twice before it answered once
        await house.up("vllm")  # whoever asks for it by name need not wait

    house.run(main)


def test_an_engine_that_hangs_is_ended(house: House) -> None:
    async def main() -> None:
        model, live = await house.up("vllm")
        identity = live.process.identity
        lease = take(model)
        draining = coming_to(model, State.DRAINING)
        for pid in members(identity):
            os.kill(pid, signal.SIGSTOP)
        await draining.wait()
        assert "its health was silent 2 times" in model.reason
        assert model.grant(Ask(model.id, PATH, 100), 0.0) is None
        await model.settled()
        assert "it hung" in model.reason
        assert members(identity) == []
        assert not lease.is_held

    house.run(main)


def test_a_start_that_fails_says_why_and_leaves_nothing(house: House) -> None:
    async def main() -> None:
        wrong = house.model(house.settings("wrong", args=("--no-such-flag",)))
        slow = house.model(house.settings("slow", start_limit_seconds=0.5))
        lost = house.model(house.settings("lost").model_copy(update={"environment": "none"}))
        failed = [coming_to(model, State.FAILED) for model in (wrong, slow, lost)]
        cold = coming_to(slow, State.COLD)
        for model in (wrong, slow, lost):
            model.start(HOST, "a test wants it")
        for each in failed:
            await each.wait()
        assert "--no-such-flag" in wrong.failure
        assert "log ends with" in wrong.failure
        assert "start_limit of 0.5 s" in slow.failure
        assert "no environment 'none'" in lost.failure
        for model in (wrong, slow, lost):
            assert not model.is_out_of_memory
            assert not model.num_leases
        await cold.wait()  # after its first pause it may be tried again
        assert not list(house.folder.engines.glob("s*.sock"))

    house.run(main)


def test_a_stop_ends_a_start(house: House) -> None:
    async def main() -> None:
        model = house.model(house.settings("stopped"))
        starting = coming_to(model, State.STARTING)
        model.start(HOST, "a test wants it")
        await starting.wait()
        model.stop("nobody wants it any more")
        await model.settled()
        assert model.state is State.COLD
        assert model.engine is None

    house.run(main)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_is_warm_when_it_has_answered_a_known_prompt(house: House, engine: str) -> None:
    async def main() -> None:
        model, live = await house.up(engine, engine=engine)
        assert model.token == live.token != ""
        assert await live.verify() == model.token
        assert model.num_starts >= 1
        assert model.start_seconds > 0
        assert await live.health()
        assert model.id in await live.served_names()
        before = await live.counters()
        assert before.num_prompt_tokens > 0
        async with Stream(live.address, ALIAS) as answer:
            assert answer.status == 200
            await answer.content.readany()
            assert (await live.counters()).num_tokens > before.num_tokens

        other = Engine(live.words, live.settings, live.process, replace(live.record(), token=ALIAS))
        with pytest.raises(EngineStartError, match="its weights are not what they were"):
            await other.verify()
        await other._session.close()

    house.run(main)


@pytest.mark.parametrize(
    "engine", ["vllm", pytest.param("sglang", marks=pytest.mark.every_release)]
)
def test_nobody_else_can_reach_an_engine(house: House, engine: str) -> None:
    async def main() -> None:
        _, live = await house.up(engine)
        assert stat.S_IMODE(live.log.stat().st_mode) == 0o600
        assert stat.S_IMODE(house.folder.engines.stat().st_mode) == 0o700
        assert not list(house.folder.engines.glob("*.yaml"))
        if live.address.socket:
            assert Path(live.address.socket).parent == house.folder.engines
            return
        key = live.address.headers["Authorization"].removeprefix("Bearer ")
        assert len(key) > 40
        for pid in members(live.process.identity):
            assert key not in " ".join(psutil.Process(pid).cmdline())
        async with aiohttp.ClientSession(live.address.url) as session:
            for path in ("/v1/models", "/load_lora_adapter", "/flush_cache"):
                async with session.post(path, json={}) as answer:
                    assert answer.status == 401

    house.run(main)
