"""What the benchmark of activations through the gateway asks, where, and what it says of it."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from gateway_activation import AWAKE, BESIDE, GONE, TTFT, make_parser, table
from gateway_through import CONTROL, DIRECT, THROUGH, WAYS, in_turn, summarise
from parts.gateway_client import Answer, send
from parts.gateway_schedule import Due
from parts.gateway_serve import Gateway, headroom_bytes
from parts.giving import PART, little_room

from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.units import GIB, MIB
from kvcached_demo.harness.engines import ENGINES
from kvcached_gateway.engines.sessions import Identity
from kvcached_gateway.engines.state_file import EngineRecord, Folder
from kvcached_gateway.lease import Address
from kvcached_gateway.settings.config_file import read_settings


def a_round(direct: float, through: float, control: float, share: float) -> dict[str, Any]:
    seconds = {DIRECT: direct, THROUGH: through, CONTROL: control}
    return {way: {TTFT: found, "weights_share": share} for way, found in seconds.items()}


def results(shape: str, *rounds: dict[str, Any], state: str = GONE) -> dict[str, Any]:
    found = {"rounds": list(rounds)} | summarise(rounds, (TTFT,))
    return {"shape": shape, "states": {state: found}, "wrong": 0}


def test_each_way_is_first_as_often_as_the_others() -> None:
    orders = [in_turn(number) for number in range(2 * len(WAYS))]
    assert all(sorted(order) == sorted(WAYS) for order in orders)
    for place in range(len(WAYS)):
        assert set(Counter(order[place] for order in orders).values()) == {2}


def test_a_row_has_medians_ratios_of_the_same_round_and_the_verdict() -> None:
    found = results("llama-8b", a_round(0.3, 0.33, 0.3, 0.0), a_round(0.2, 0.22, 0.3, 0.0))
    _, row, wrong = table(found).splitlines()
    assert row.split("  ")[0] == GONE
    for words in ("0%", "0.2500", "0.2750", "1.100 (1.100 to 1.100)", "1.250", "0.7 s: met"):
        assert words in row
    assert wrong == "wrong answers: 0"


def test_a_bar_is_of_the_way_through_the_gateway_and_of_weights_that_are_gone() -> None:
    slow = a_round(0.3, 0.8, 0.3, 1.0)
    assert "missed" in table(results("llama-8b", slow))
    assert "met" in table(results("llama-70b", slow, state=BESIDE))
    assert "0.7 s" not in table(results("llama-8b", slow, state=AWAKE))
    assert "missed" not in table(results("llama-1b", slow))


def test_a_run_that_was_cut_off_before_its_first_round_has_a_table() -> None:
    assert "wrong answers: unknown" in table({"shape": "tiny"})


def test_what_runs_without_options_is_the_shape_that_has_a_bar() -> None:
    options = make_parser().parse_args(["--json", "file"])
    assert (options.shape, options.ranks, options.engine) == ("llama-8b", 1, "vllm")


def test_a_gpu_is_as_small_as_was_asked_and_never_larger_than_it_is() -> None:
    machine = {"gpu_bytes": str(140 * GIB)}
    assert headroom_bytes(machine, 80.0) == 60 * GIB
    assert headroom_bytes(machine, 200.0) == 0


def a_gateway(engine: str, **more: Any) -> Gateway:
    return Gateway(2, headroom_bytes=GIB, tiny_kv_bytes=0, engine=ENGINES[engine], **more)


@pytest.mark.parametrize(
    ("engine", "cards", "is_tiny"), [("sglang", 1, True), ("vllm", 4, False), ("vllm", 1, True)]
)
def test_the_file_is_one_that_the_gateway_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, cards: int, *, is_tiny: bool
) -> None:
    monkeypatch.setattr("parts.gateway_serve.MEMORY", str(tmp_path))
    gateway = a_gateway(engine, cards=cards, tiny=is_tiny, shape="llama-70b", ranks=cards)
    file = tmp_path / "models.yaml"
    file.touch(mode=0o600)
    file.write_text(yaml.safe_dump(gateway.settings({}, {})))
    settings = read_settings(file)
    assert {each.engine for each in settings.environments.values()} == {engine}
    assert [model.tensor_parallel for model in settings.models.values()] == [cards, cards]
    assert len(settings.devices) == cards
    gateway.close()


def test_engines_are_asked_where_the_gateway_wrote_down_that_they_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parts.gateway_serve.MEMORY", str(tmp_path))
    gateway = a_gateway("sglang", cards=1, tiny=True)
    address = Address("http://127.0.0.1:9", headers={"Authorization": "Bearer own"}, is_ours=True)
    identity = Identity(1, 2, "boot")
    record = EngineRecord(
        "model-0", "sglang", identity, address, ("host",), "", "model-0", is_elastic=True, log=""
    )
    with Folder(gateway.directory) as folder:
        folder.write([record])
    assert gateway.addresses() == {"model-0": address}
    gateway.close()


def ask_engine(tmp_path: Path, *events: dict[str, Any]) -> tuple[Answer, list[str | None]]:
    """Ask an engine on a socket that answers with these events; return its clients' keys, too."""
    keys: list[str | None] = []
    socket = str(tmp_path / "socket")

    async def answer(request: web.Request) -> web.Response:
        keys.append(request.headers.get("Authorization"))
        said = "".join(f"data: {json.dumps({'choices': [each]})}\n\n" for each in events)
        return web.Response(text=said + "data: [DONE]\n\n")

    async def main() -> Answer:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.UnixSite(runner, socket).start()
            address = Address("http://localhost", socket, {"Authorization": "Bearer own"})
            (found,) = await send(address, [Due(0.0, "one", (3,), 2)])
        finally:
            await runner.cleanup()
        return found

    return asyncio.run(main()), keys


def test_an_engine_is_asked_over_its_socket_with_its_key(tmp_path: Path) -> None:
    found, keys = ask_engine(tmp_path, {"token_ids": [7]}, {"token_ids": [8]})
    assert (found.token_ids, found.error, keys) == ([7, 8], "", ["Bearer own"])


def test_what_an_engine_says_only_as_text_is_an_answer_too(tmp_path: Path) -> None:
    found, _ = ask_engine(tmp_path, {"text": " w7"}, {"text": " w8"})
    assert (found.text, found.token_ids, found.error) == (" w7 w8", [], "")
    assert found.ttft_seconds is not None


@pytest.mark.parametrize("event", [{"token_ids": [7]}, {"text": ""}])
def test_an_answer_with_too_little_is_an_error(tmp_path: Path, event: dict[str, Any]) -> None:
    found, _ = ask_engine(tmp_path, event)
    assert "of 2 tokens came" in found.error


@pytest.mark.parametrize("headroom", [0, 128 * MIB])
def test_room_is_left_for_a_part_of_the_weights_and_given_back_behind_the_block(
    tmp_path: Path, headroom: int
) -> None:
    directory = ledger_directory(tmp_path / "kv")
    needed_bytes = 256 * MIB
    with Ledger(directory / "host.ledger", GIB) as ledger:
        row = ledger.register(name="one", engine="test")
        ledger.describe_weights(row, needed_bytes)
        before = ledger.free_bytes(row)
        with little_room("one", directory, headroom):
            assert ledger.free_bytes(row) == headroom + needed_bytes // PART
        assert ledger.free_bytes(row) == before
