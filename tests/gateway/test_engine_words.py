"""What engines are told and asked: no key where others see it, and counters that move."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvcached_core.config import read_config
from kvcached_core.engine.placing import Placing, Planes
from kvcached_core.errors import ConfigError
from kvcached_core.memory.devices import Device
from kvcached_core.units import GIB, MIB
from kvcached_gateway.engines.sglang import SglangWords
from kvcached_gateway.engines.vllm import VllmWords
from kvcached_gateway.engines.words import Counters, EngineWords
from kvcached_gateway.errors import EngineStartError
from kvcached_gateway.settings.config import Environment, KvSettings, ModelSettings

VLLM, SGLANG = VllmWords(), SglangWords()
HOST = ("host",)
GPUS = ("GPU-1", "GPU-2")
FOLDER = Path("/run/kv/gateway/engines")
KEYS = Path("/run/kv/gateway/engines/a.yaml")
EXPOSITION = {
    "vllm": """
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="a"} 2.0
vllm:num_requests_waiting{engine="0",model_name="a"} 3.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="a",reason="capacity"} 3.0
vllm:prompt_tokens_total{engine="0",model_name="a"} 1.25e+03
vllm:prompt_tokens_created{engine="0",model_name="a"} 1.7e+09
vllm:prefix_cache_hits_total{engine="0",model_name="a"} 100.0
vllm:generation_tokens_total{engine="0",model_name="a"} 30.0
vllm:generation_tokens_total{engine="1",model_name="a"} 10.0
""",
    "sglang": """
sglang:num_running_reqs{model_name="a",tp_rank="0"} 2.0
sglang:num_queue_reqs{model_name="a",tp_rank="0"} 3.0
sglang:prompt_tokens_total{model_name="a"} 7.0
sglang:realtime_tokens_total{model_name="a",mode="prefill_compute"} 1150.0
sglang:realtime_tokens_total{model_name="a",mode="prefill_cache"} 100.0
sglang:realtime_tokens_total{model_name="a",mode="decode"} 40.0
""",
}


def environment(engine: str, **more: Any) -> Environment:
    python = Path("/opt/e/bin/python")
    return Environment(name="e", engine=engine, python=python, args=("--all",), **more)


def model(**more: Any) -> ModelSettings:
    return ModelSettings(**{"id": "a", "model": "/models/a", "args": ("--own",)} | more)


def command(words: EngineWords, settings: ModelSettings, devices: tuple[str, ...] = GPUS) -> str:
    address = words.address(FOLDER, settings.instance_name)
    return " ".join(words.command(settings, environment(words.name), devices, address, KEYS))


def test_vllm_listens_on_a_socket_and_knows_every_name_of_its_model() -> None:
    settings = model(aliases=("b", "c"), revision="0e9", tensor_parallel=2)
    assert command(VLLM, settings) == (
        "/opt/e/bin/python -m vllm.entrypoints.cli.main serve /models/a --served-model-name a b c "
        "--uds /run/kv/gateway/engines/a.sock --disable-uvicorn-access-log "
        "--revision 0e9 --tensor-parallel-size 2 --all --own"
    )
    assert VLLM.key_file(VLLM.address(FOLDER, "a")) is None


def test_sglang_reads_a_key_from_a_file_that_no_command_shows() -> None:
    address = SGLANG.address(FOLDER, "a")
    words = SGLANG.command(
        model(revision="0e9", tensor_parallel=2), environment("sglang"), GPUS, address, KEYS
    )
    port = address.url.removeprefix("http://127.0.0.1:")
    assert " ".join(words) == (
        f"/opt/e/bin/python -m sglang.launch_server --config {KEYS} --model-path /models/a "
        f"--served-model-name a --host 127.0.0.1 --port {port} --enable-metrics "
        "--revision 0e9 --tp-size 2 --all --own"
    )
    key = address.headers["Authorization"].removeprefix("Bearer ")
    assert yaml.safe_load(SGLANG.key_file(address)) == {"api-key": key}
    assert key != SGLANG.address(FOLDER, "a").headers["Authorization"].removeprefix("Bearer ")


def test_sglang_is_told_of_the_cpu_and_of_vectors() -> None:
    assert "--device cpu" in command(SGLANG, model(), HOST)
    assert "--device" not in command(SGLANG, model())
    assert "--is-embedding" in command(SGLANG, model(kind="pooling"))


@pytest.mark.parametrize("words", [VLLM, SGLANG])
def test_the_file_s_variables_come_before_ours_except_name_and_device(words: EngineWords) -> None:
    given = {"ENABLE_KVCACHED": "0", "KVCACHED_NAME": "x", "CUDA_VISIBLE_DEVICES": "7", "MINE": "1"}
    settings = model(kv=KvSettings(floor="4GiB", limit="60%", priority=-3), when_idle="stay")
    found = words.environ(settings, environment(words.name, env=given), GPUS)
    expected = {
        "ENABLE_KVCACHED": "0",
        "KVCACHED_NAME": "a",
        "KVCACHED_WEIGHTS": "keep",
        "KVCACHED_FLOOR": str(settings.kv.floor),
        "KVCACHED_LIMIT": "60%",
        "KVCACHED_PRIORITY": "-3",
        "CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2",
        "MINE": "1",
    }
    assert expected.items() <= found.items()
    plain = words.environ(model(), environment(words.name), HOST)
    assert plain["ENABLE_KVCACHED"] == "1"
    assert plain["KVCACHED_WEIGHTS"] == "yield"
    assert not {"CUDA_VISIBLE_DEVICES", "KVCACHED_FLOOR", "KVCACHED_LIMIT"} & plain.keys()


def test_a_socket_s_path_is_short_enough_or_refused() -> None:
    long = "n" * 64
    deep = Path("/" + "d" * 80)
    for folder in (FOLDER, deep):
        socket = VLLM.address(folder, long).socket
        assert socket is not None
        assert len(socket) <= 107
    assert VLLM.address(deep, long) != VLLM.address(deep, long.upper())
    with pytest.raises(EngineStartError, match="107 bytes are allowed; set KVCACHED_DIR"):
        VLLM.address(Path("/" + "d" * 100), "n")


@pytest.mark.parametrize("words", [VLLM, SGLANG])
def test_counters_are_read_whatever_their_labels(words: EngineWords) -> None:
    assert words.read_counters(EXPOSITION[words.name]) == Counters(2, 3, 1250, 100, 40)
    assert words.read_counters(EXPOSITION[words.name]).num_tokens == 1290
    assert words.read_counters("") == Counters(0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("words", "arguments", "expected"),
    [
        (VLLM, [], 1),
        (VLLM, ["--max-loras", "4"], 4),
        (VLLM, ["--max-loras=4", "--max-cpu-loras=9"], 9),
        (VLLM, ["--max-loras", "none"], 1),
        (SGLANG, [], 8),
        (SGLANG, ["--max-loras-per-batch", "2", "--max-loaded-loras", "16"], 16),
    ],
)
def test_how_many_adapters_an_engine_keeps_is_in_its_arguments(
    words: EngineWords, arguments: list[str], expected: int
) -> None:
    assert words.max_adapters(arguments) == expected


def test_an_adapter_has_a_name_that_its_engine_finds_in_a_body() -> None:
    assert VLLM.adapter_name(model(), "anything") == "anything"
    assert SGLANG.adapter_name(model(), "a:style") == "style"
    for name in ("style", "a:", "b:style"):
        with pytest.raises(EngineStartError, match=r"call it 'a:\.\.\.' in the file of models"):
            SGLANG.adapter_name(model(), name)


def test_an_answer_is_one_token_or_the_beginning_of_a_vector() -> None:
    assert VLLM.answer(b'{"choices": [{"text": " 10"}]}') == '" 10"'
    assert VLLM.answer(b'{"choices": [{"text": ""}]}')  # half a character is an answer, too
    pooling = model(kind="pooling")
    assert SGLANG.question(pooling).path == "/v1/embeddings"
    one, close, other = (
        VLLM.answer(b'{"data": [{"embedding": %s}]}' % values)
        for values in (b"[0.5, -0.25, 1]", b"[0.501, -0.249, 1.002]", b"[-0.5, 0.25, 1]")
    )
    assert VLLM.is_same(one, close, pooling)
    assert not VLLM.is_same(one, other, pooling)
    assert not VLLM.is_same(one, VLLM.answer(b'{"data": [{"embedding": [1]}]}'), pooling)
    assert not VLLM.is_same("10", "11", model())


def test_vllm_is_asked_where_models_that_embed_and_models_that_score_both_answer() -> None:
    pooling = model(kind="pooling")
    assert VLLM.question(pooling).path == "/pooling"
    assert VLLM.question(model()).path == "/v1/completions"
    vector = VLLM.answer(b'{"data": [{"data": [0.5, -0.25, 1]}]}')
    assert vector == VLLM.answer(b'{"data": [{"embedding": [0.5, -0.25, 1]}]}')
    score, close, other = (
        VLLM.answer(b'{"data": [{"data": [%s]}]}' % value) for value in (b"0.61", b"0.612", b"0.8")
    )
    assert VLLM.is_same(score, close, pooling)
    assert not VLLM.is_same(score, other, pooling)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"1", b'{"choices": []}', b'{"error": "no"}', b'{"data": []}'],
)
def test_what_is_no_answer_is_said_to_be_none(body: bytes) -> None:
    said = f"its answer to a known prompt is none: {body.decode()!r}"
    with pytest.raises(EngineStartError, match=f"^{re.escape(said)}$"):
        VLLM.answer(body)
    assert VLLM.served_names(body) == frozenset()


@pytest.mark.parametrize("values", ["[]", "[nan]"])
def test_a_vector_that_is_none_is_said_to_be_none(values: str) -> None:
    body = f'{{"data": [{{"embedding": {values.replace("nan", "NaN")}}}]}}'.encode()
    said = f"it answered a vector that is none: {values}"
    with pytest.raises(EngineStartError, match=f"^{re.escape(said)}$"):
        VLLM.answer(body)
    assert VLLM.served_names(body) == frozenset()


def test_names_are_those_of_the_list_of_models() -> None:
    body = b'{"data": [{"id": "a"}, {"id": "b", "root": "a"}]}'
    assert SGLANG.served_names(body) == {"a", "b"}


class FullLedgers:
    """Ledgers that have no page left."""

    capacity_bytes = GIB

    def describe(self, **sizes: int) -> None:
        pass

    def announce(self, static_bytes: int) -> None:
        pass

    def promise_first_page(self) -> str:
        return "4 MiB of 4 MiB are missing on host"


@pytest.mark.parametrize("words", [VLLM, SGLANG])
def test_a_start_without_room_for_a_first_page_found_too_little_memory(words: EngineWords) -> None:
    device, logger = Device("host", "host", GIB), logging.getLogger("kvcached")
    place = Placing(FullLedgers(), read_config({}), device, logger, length_setting="--length")
    with pytest.raises(ConfigError) as raised:
        place.place(Planes(64 * 1024, 8, 1000, 100, (16,)), 2 * MIB)
    assert any(each in str(raised.value) for each in words.out_of_memory)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4096", 4096), ("32k", 32000), ("32K", 32768), ("1.5k", 1500), ("auto", None), ("-1", None)],
)
def test_how_long_a_request_may_be_is_in_the_arguments(text: str, expected: int | None) -> None:
    for words, flag in ((VLLM, "--max-model-len"), (SGLANG, "--context-length")):
        assert words.max_tokens(["--other", "7", flag, text]) == expected
        assert words.max_tokens([f"{flag}={text}", "--last"]) == expected
        assert words.max_tokens(["--other", "7"]) is None


def test_sglang_bears_a_neighbour_on_one_of_its_devices_unless_the_file_says_otherwise() -> None:
    check = "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"
    for env, expected in (({}, "0"), ({check: "1"}, "1")):
        there = environment("sglang", env=env)
        assert SGLANG.environ(model(tensor_parallel=2), there, GPUS)[check] == expected
    assert check not in SGLANG.environ(model(), environment("sglang"), GPUS[:1])


def test_vllm_knows_its_model_by_the_names_that_it_was_started_with_and_sglang_by_any() -> None:
    settings = model(aliases=("gpt",))
    names = (settings.id, "gpt", "new")
    assert [VLLM.serves(settings, name) for name in names] == [True, True, False]
    assert all(SGLANG.serves(settings, name) for name in names)
