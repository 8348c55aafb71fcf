"""A whole gateway over real engines, where its users, operator and machine are unlucky."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapter import RANK, make_adapter
from helpers.gateway_real import GREEDY, RealGateway, gateway_of, write_file
from safetensors.numpy import load_file, save_file

from kvcached_core.errors import KVCachedError
from kvcached_demo.harness.model import make_model
from kvcached_gateway.engines.sessions import members
from kvcached_gateway.http import passage
from kvcached_gateway.serve import serving
from kvcached_gateway.state import State

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
SEEDS = {"one": 3, "two": 4}


def models_of(folder: Path) -> dict[str, dict[str, Any]]:
    base = make_model(folder / "base", seed=1)
    plain = make_model(folder / "plain", seed=2)
    adapters = {
        name: {"adapter_of": "base", "path": str(make_adapter(folder / name, base, seed=seed))}
        for name, seed in SEEDS.items()
    }
    lora = ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(RANK)]
    return {
        "base": {"environment": "vllm", "model": str(base), "args": lora},
        **adapters,
        "gone": {"adapter_of": "base", "path": str(folder / "gone")},
        "plain": {"environment": "vllm", "model": str(plain), "max_concurrent": 1},
        "vector": {
            "environment": "vllm",
            "model": str(base),
            "kind": "pooling",
            "loading": "refuse",
            "args": ["--runner", "pooling"],
        },
    }


@pytest.fixture(scope="module")
def gateway() -> Iterator[RealGateway]:
    with gateway_of(models_of) as served:
        yield served


def change_weights(file: Path) -> None:
    """Let a model answer nothing but two words."""
    weights = load_file(file)
    head = np.zeros_like(weights["lm_head.weight"])
    head[300], head[301] = 1.0, -1.0
    save_file(weights | {"lm_head.weight": head}, file, metadata={"format": "pt"})


async def asked_in_order(
    gateway: RealGateway, name: str, num: int, **more: Any
) -> list[asyncio.Task[tuple[int, dict[str, Any]]]]:
    """Ask a model that nobody else asks, each time when the request before has come."""
    model, line = gateway[name], gateway.here.gateway.models
    tasks: list[asyncio.Task[tuple[int, dict[str, Any]]]] = []
    assert model.num_leases == 0

    def num_here() -> int:
        waiting = next(row.num_waiting for row in line() if row.id == name)
        return waiting + model.num_leases + sum(task.done() for task in tasks)

    for number in range(num):
        tasks.append(asyncio.create_task(gateway.ask(name, f"page {number}", **more)))
        while num_here() <= number:  # noqa: ASYNC110  nobody tells when one has come
            await asyncio.sleep(0)
    return tasks


@pytest.mark.every_release
def test_adapters_are_models_and_the_least_used_makes_room(gateway: RealGateway) -> None:
    async def main() -> None:
        texts = {name: await gateway.text(name) for name in ("base", *SEEDS)}
        assert len(set(texts.values())) == 3
        assert gateway["base"].adapters == ("two",)
        names = await gateway["base"].engine.served_names()  # type: ignore[union-attr]
        assert names == {"base", "two"}
        for name in ("one", "base", "two", "one"):
            assert await gateway.text(name) == texts[name]
        asked = [*SEEDS] * 4  # all at once: each waits until the other one is not used
        answers = await asyncio.gather(*(gateway.text(name) for name in asked))
        for name, text in zip(asked, answers, strict=True):
            others = {texts[other] for other in texts if other != name}
            assert text not in others, (name, text, texts)  # a batch rounds as it likes
        status, body = await gateway.ask("gone")
        assert status == 404  # the engine's own words
        assert "gone" in body["error"]["message"]
        assert await gateway.text("one") == texts["one"]
        assert gateway["base"].num_starts == 1

    gateway.run(main)


@pytest.mark.every_release
def test_a_model_of_vectors_is_verified_by_one(gateway: RealGateway) -> None:
    async def main() -> None:
        await gateway.warm("vector")
        model = gateway["vector"]
        assert model.state is State.WARM, model.failure
        vector = json.loads(model.token)
        assert len(vector) == 32
        body = {"model": "vector", "input": "memory"}
        async with gateway.session.post("/v1/embeddings", json=body) as answer:
            assert answer.status == 200
            assert len((await answer.json())["data"][0]["embedding"]) == 128
        await gateway.stop("vector")
        model.token = json.dumps([-each for each in vector])
        await gateway.warm("vector")
        assert "its weights are not what they were" in model.failure
        assert model.engine is None

    gateway.run(main)


def test_two_hundred_requests_at_a_yielded_model_are_answered_in_order(
    gateway: RealGateway,
) -> None:
    async def main() -> None:
        await gateway.warm("plain")
        pid = gateway.pid("plain")
        await gateway.here.gateway.steer("plain", "sleep")
        await gateway.come_to("plain", State.YIELDED)
        order: list[int] = []
        tasks = await asked_in_order(gateway, "plain", 200, max_tokens=1)
        for number, task in enumerate(tasks):
            task.add_done_callback(lambda _task, number=number: order.append(number))
        assert [(await task)[0] for task in tasks] == [200] * 200
        await asyncio.sleep(0)
        assert sorted(order) == order
        assert gateway.pid("plain") == pid

    gateway.run(main)


def test_a_stop_while_requests_wait_ends_the_engine_and_serves_them_by_the_next(
    gateway: RealGateway,
) -> None:
    async def main() -> None:
        await gateway.warm("plain")
        pid, num_starts = gateway.pid("plain"), gateway["plain"].num_starts
        with gateway.silent("plain"):  # an answer would end when it likes
            tasks = await asked_in_order(gateway, "plain", 4)
            await gateway.here.gateway.steer("plain", "stop")
            await gateway.come_to("plain", State.DRAINING)
            assert gateway["plain"].num_leases == 1
        assert (await tasks[0])[0] == 200
        assert [(await task)[0] for task in tasks[1:]] == [200] * 3
        assert gateway["plain"].num_starts == num_starts + 1
        assert gateway.pid("plain") != pid

    gateway.run(main)


@pytest.mark.every_release
def test_a_stream_gets_comments_while_its_model_starts_and_then_its_answer(
    gateway: RealGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passage, "COMMENT_SECONDS", 0.2)

    async def main() -> None:
        gateway.models["plain"]["loading"] = "comments"
        gateway.write()
        await gateway.here.gateway.reload()
        await gateway.stop("plain")
        body = {"model": "plain", "prompt": "page", **GREEDY, "stream": True}
        async with gateway.session.post("/v1/completions", json=body) as answer:
            assert answer.content_type == "text/event-stream"
            told = await answer.text()
        first, _, rest = told.partition("data: ")
        assert set(first.split("\n\n")) == {": the model is starting", ""}
        events = [json.loads(each) for each in rest.split("\n\ndata: ")[:-1]]
        assert "".join(event["choices"][0]["text"] for event in events)
        assert told.endswith("data: [DONE]\n\n")
        del gateway.models["plain"]["loading"]

    gateway.run(main)


@pytest.mark.every_release
def test_a_reload_takes_out_a_model_on_its_way_and_another_one_starts_anew(
    gateway: RealGateway,
) -> None:
    async def main() -> None:
        await gateway.warm("base")
        base = gateway.pid("base")
        await gateway.stop("plain")
        asked = asyncio.create_task(gateway.ask("plain"))
        await gateway.come_to("plain", State.STARTING)
        model, settings = gateway["plain"], gateway.models.pop("plain")
        gateway.write()
        assert "plain" in await gateway.here.gateway.reload()
        status, body = await asked
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        await model.settled()
        assert model.state is State.COLD
        gateway.models["plain"] = settings
        gateway.write()
        await gateway.here.gateway.reload()
        asked = asyncio.create_task(gateway.ask("plain"))
        await gateway.come_to("plain", State.STARTING)
        settings["args"] = ["--max-num-batched-tokens", "512"]
        gateway.write()
        await gateway.here.gateway.reload()  # it is started with what the file said before
        assert (await asked)[0] == 200
        await gateway.come_to("plain", State.STARTING)
        await gateway.here.gateway.settled("plain")
        assert gateway["plain"].num_starts == 2
        assert gateway.pid("base") == base

    gateway.run(main)


@pytest.mark.every_release
def test_a_model_whose_files_changed_is_not_served_until_it_is_started_anew(
    gateway: RealGateway,
) -> None:
    async def main() -> None:
        await gateway.warm("plain")
        model, before = gateway["plain"], await gateway.text("plain")
        await gateway.stop("plain")
        change_weights(gateway.folder / "plain" / "model.safetensors")
        status, body = await gateway.ask("plain")
        assert (status, body["error"]["code"]) == (503, "model_failed")
        assert "its weights are not what they were" in body["error"]["message"]
        assert model.engine is None
        await gateway.warm("plain")
        assert await gateway.text("plain") != before

    gateway.run(main)


def test_where_the_ledgers_cannot_be_seen_those_that_are_up_serve_and_nothing_starts(
    gateway: RealGateway,
) -> None:
    async def main() -> None:
        await gateway.warm("base")
        await gateway.stop("vector")
        num_starts = gateway["vector"].num_starts
        gateway.directory.chmod(0o755)
        try:
            while not gateway.here.controller.blindness:  # noqa: ASYNC110  nobody tells
                await asyncio.sleep(0.05)
            assert (await gateway.ask("base"))[0] == 200
            status, body = await gateway.ask("vector")
            assert (status, body["error"]["code"]) == (503, "model_loading")
            assert "nothing starts" in body["error"]["message"]
            assert "open to other users" in body["error"]["message"]
            assert gateway["vector"].num_starts == num_starts
        finally:
            gateway.directory.chmod(0o700)
        await gateway.here.gateway.settled("vector")
        assert gateway["vector"].state is State.WARM
        await gateway.stop("vector")

    gateway.run(main)


@pytest.mark.every_release
def test_a_state_that_cannot_be_written_ends_nothing_and_is_written_the_next_time(
    gateway: RealGateway, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        blocker = gateway.directory / "gateway" / "gateway.new"
        state = gateway.directory / "gateway" / "gateway.json"
        await gateway.warm("base")
        await gateway.stop("plain")
        written = state.read_bytes()
        blocker.mkdir()
        assert (await gateway.ask("plain"))[0] == 200
        assert "what runs cannot be written down" in caplog.text
        assert state.read_bytes() == written
        blocker.rmdir()
        await gateway.stop("plain")
        assert [each["model_id"] for each in json.loads(state.read_bytes())["engines"]] == ["base"]

    gateway.run(main)


LOOK = """
import os, socket, sys
os.setgid(65534), os.setuid(65534)
for path in sys.argv[1:]:
    try:
        if path.endswith(".sock"):
            socket.socket(socket.AF_UNIX).connect(path)
        elif os.path.isdir(path):
            os.listdir(path)
        else:
            open(path).read()
    except PermissionError:
        continue
    print(path)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_another_user_reaches_no_socket_state_or_log(gateway: RealGateway) -> None:
    async def main() -> None:
        await gateway.warm("base")
        own = gateway.directory / "gateway"
        paths = [gateway.directory, *sorted(own.rglob("*"))]
        names = {path.name for path in paths}
        assert {"gateway.json", "gateway.sock", "gateway.lock", "base.log"} <= names
        assert any(path.parent.name == "engines" for path in paths)
        gateway.folder.chmod(0o755)  # only the folder of the ledgers itself keeps others out
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", LOOK, *map(str, paths)],
            cwd="/",
            env={},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == ""

    gateway.run(main)


def test_a_gateway_serves_the_models_of_another_one(gateway: RealGateway) -> None:
    async def main() -> None:
        directory = gateway.folder / "second"
        file = gateway.folder / "second.yaml"
        far = {name: {"url": gateway.url} for name in ("base", "one", "nobody")}
        write_file(file, far)
        texts = [await gateway.text(name) for name in ("base", "one")]
        async with serving(file, directory) as second:
            url = f"http://127.0.0.1:{second.port}/v1/completions"
            for name, text in zip(("base", "one"), texts, strict=True):
                body = {"model": name, "prompt": "memory follows the load", **GREEDY}
                async with gateway.session.post(url, json=body) as answer:
                    assert answer.status == 200
                    assert (await answer.json())["choices"][0]["text"] == text
            async with gateway.session.post(url, json={"model": "nobody"}) as answer:
                assert answer.status == 503
                assert "and no 'nobody'" in (await answer.json())["error"]["message"]
            with pytest.raises(KVCachedError, match="served elsewhere"):
                await second.gateway.steer("base", "stop")
        assert (await gateway.ask("base"))[0] == 200
        assert members(gateway["base"].record().identity)  # type: ignore[union-attr]

    gateway.run(main)
