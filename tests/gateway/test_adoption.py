"""A gateway that was killed leaves its engines alive, and the next one takes over what it knows."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

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
from helpers.gateway_runner import record_of
from helpers.waiting import await_that

from kvcached_core.ledger.ledger import Ledger
from kvcached_core.units import GIB
from kvcached_demo.harness.model import make_model
from kvcached_gateway.engines.adoption import identify
from kvcached_gateway.engines.engine import Engine
from kvcached_gateway.engines.sessions import Identity, kill_session, members
from kvcached_gateway.engines.state_file import EngineRecord, Folder
from kvcached_gateway.errors import AdoptionError
from kvcached_gateway.models.model import Model, State

NAMES = ("one", "two")
ANOTHER = "another"


async def serve(directory: Path, weights: Path) -> None:
    """Be a gateway: start the models, write down what runs, and go on until it is killed."""
    folder = Folder(directory)
    runner = make_runner(folder, directory, launch=launch_warm)
    models = [Model(settings_of(name, weights), runner, patience=QUICK) for name in NAMES]
    for model in models:
        model.start(HOST, "the first gateway wants it")
        await model.settled()
        folder.write([record for each in models if (record := each.record())])
    await asyncio.Event().wait()


def left_by_a_killed_gateway(directory: Path, weights: Path) -> list[EngineRecord]:
    """Fork a gateway, kill it when its engines are up, and return what it wrote down."""
    gateway = os.fork()
    if gateway == 0:
        try:
            asyncio.run(serve(directory, weights))
        finally:
            os._exit(1)
    file = directory / "gateway" / "gateway.json"
    try:
        await_that(lambda: file.exists() and file.read_text().count("model_id") == 2)
    finally:
        os.kill(gateway, signal.SIGKILL)
        os.waitpid(gateway, 0)
    with Folder(directory) as folder:
        return folder.read()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", seed=1)


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_folder() as path:
        yield path


# Under `make test` real engines are adopted in test_gateway_serving.
@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.every_release
def test_engines_of_a_killed_gateway_are_adopted_if_they_are_what_they_were(
    directory: Path, weights: Path
) -> None:
    warm_up("vllm")
    records = left_by_a_killed_gateway(directory, weights)
    assert [record.model_id for record in records] == list(NAMES)
    assert all(record.identity.is_running() for record in records)

    async def adopt(folder: Folder, record: EngineRecord, *args: str) -> Model:
        runner = make_runner(folder, directory)
        settings = settings_of(record.model_id, weights, args=args)
        model = Model(settings, runner, patience=QUICK)
        model.adopt(record)
        await model.settled()
        return model

    async def main() -> None:
        one, two = records
        with Folder(directory) as folder:
            identity = replace(one.identity, start_ticks=one.identity.start_ticks - 1)
            path = directory / "stranger.sock"
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(str(path))
            address = replace(one.address, socket=str(path))
            model = await adopt(folder, replace(one, identity=identity, address=address))
            assert not path.is_socket()
            assert model.state is State.COLD
            assert f"the number {one.identity.pid} is another process's" in model.reason
            await model.close(is_kept=False)
            assert one.identity.is_running()  # it is not what was asked about, so it stays

            model = await adopt(folder, one)
            assert model.state is State.WARM, model.reason
            assert isinstance(model.engine, Engine)
            assert model.engine.process.identity == one.identity
            assert (model.token, model.num_starts) == (one.token, 1)
            assert model.record() == replace(one, start_seconds=model.start_seconds)
            await model.close(is_kept=True)
            assert one.identity.is_running()

            model = await adopt(folder, one, "--max-num-batched-tokens", "512")
            assert model.state is State.COLD
            assert "other settings than the file has now" in model.reason
            assert members(one.identity) == []
            await model.close(is_kept=False)

            model = await adopt(folder, replace(two, token=ANOTHER))
            assert model.state is State.COLD
            assert "its weights are not what they were" in model.reason
            assert members(two.identity) == []
            await model.close(is_kept=False)

    asyncio.run(main())


@pytest.fixture
def stand_in() -> Iterator[Identity]:
    """Return a process that an old record may name; it is no engine, and is asked nothing."""
    words = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(words, start_new_session=True) as process:
        yield Identity.of(process.pid)
        process.kill()


def test_an_engine_without_its_socket_or_its_row_in_the_ledger_is_none(
    directory: Path, stand_in: Identity
) -> None:
    path = directory / "engine.sock"
    record = replace(record_of(), identity=stand_in)
    record = replace(record, address=replace(record.address, socket=str(path)))

    async def main() -> None:
        with pytest.raises(AdoptionError, match=r"its socket .*engine\.sock is gone"):
            await identify(record, directory)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            with pytest.raises(AdoptionError, match=r"no ledger in .* has an instance 'a'"):
                await identify(record, directory)
            process = await identify(replace(record, is_elastic=False), directory)
            assert process.identity == stand_in
            process.forget()

    asyncio.run(main())


def test_an_engine_is_adopted_although_the_ledger_of_another_device_cannot_be_read(
    directory: Path, stand_in: Identity
) -> None:
    record = replace(record_of(), identity=stand_in)
    record = replace(record, address=replace(record.address, socket=None))
    (directory / "GPU-1.ledger").write_bytes(b"nonsense")

    async def main() -> None:
        with Ledger(directory / "host.ledger", GIB) as ledger:
            ledger.register(name=record.instance_name, engine="test")
            process = await identify(record, directory)
        assert process.identity == stand_in
        process.forget()

    asyncio.run(main())


def test_one_that_is_not_adopted_is_ended(
    directory: Path, stand_in: Identity, weights: Path
) -> None:
    async def main() -> None:
        with Folder(directory) as folder:
            record = replace(record_of(), identity=stand_in)
            settings = settings_of("a", weights).model_copy(update={"environment": "gone"})
            with pytest.raises(AdoptionError, match="was ended: there is no environment 'gone'"):
                await make_runner(folder, directory).adopt(settings, record)
        assert members(stand_in) == []
        await kill_session(stand_in)

    asyncio.run(main())
