"""Real SGLang servers on the GPU: vanilla's tokens with the flag, and memory only for live tokens.

All prompts of a round come in one message, so that both servers schedule them alike. The elastic
one hands out the blocks at the top of its reservation.
"""

import os
import random
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.gpu_offline import mixed_prompts
from helpers.sglang_models import deepseek, laguna, lfm2, save
from helpers.weights import make_weights
from helpers.written import written

from kvcached_core.units import GIB
from kvcached_demo.harness.engines import SGLANG
from kvcached_demo.harness.load import generate
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import HEADROOM, Servers

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(500)]

MODELS = Path(os.environ.get("GPU_CHECK_MODELS", "/dev/shm/kvcached-models"))  # noqa: S108
ELASTIC = "elastic"
TOP_PAGES = Path(__file__).parents[1] / "helpers" / "top_pages"
OPTIONS = (
    *(*SGLANG.gpu_options(4096), "--skip-tokenizer-init", "--skip-server-warmup"),
    *("--cuda-graph-max-bs-decode", "64"),
)
# Both have room for all prompts of a round, or they would schedule them differently. On a card of
# 80 GB a fraction of 0.45 leaves 35,000 tokens beside two models, whatever is asked for.
VANILLA_TOKENS = 16 * GIB // (128 * 1024)
NUM_TOKENS = 32
NUM_PAGES_AT_REST = 2
WEIGHTS_BYTES = 16 * 10**9  # of Llama-3.1-8B's shape
FILLED_BYTES = 15 * GIB  # of 16, see TOP_PAGES
NUM_FILLS = 40

CASES = {
    "radix, graphs": (),
    "radix, eager": ("--disable-cuda-graph",),
    "no radix, graphs": ("--disable-radix-cache",),
    "no radix, eager": ("--disable-radix-cache", "--disable-cuda-graph"),
    "no radix, blocks of 16": ("--disable-radix-cache", "--page-size", "16"),
}
OTHER_MODELS = {
    "latent": (deepseek, ("--disable-radix-cache",)),
    "hybrid": (lfm2, ("--disable-radix-cache", "--max-mamba-cache-size", "256")),
    "hybrid, radix": (lfm2, ("--max-mamba-cache-size", "512")),
    "two pools": (laguna, ("--disable-radix-cache",)),
    "two pools, radix": (laguna, ()),
}


def llama() -> Path:
    return make_weights(MODELS / "llama-8b", "llama-8b")


def start(
    servers: Servers, model: Path, *arguments: str, elastic: bool, name: str = ELASTIC
) -> EngineServer:
    sizes = ("--max-total-tokens", str(VANILLA_TOKENS), "--mem-fraction-static", "0.75")
    return servers.start(
        SGLANG,
        name if elastic else "vanilla",
        model,
        *arguments,
        *(() if elastic else sizes),
        is_elastic=elastic,
        options=OPTIONS,
        environ={"PYTHONPATH": str(TOP_PAGES) if elastic else ""},
    )


def ask(server: EngineServer, prompts: list[list[int]]) -> list[list[int]]:
    return generate(server.url, prompts, NUM_TOKENS)


def pages(servers: Servers) -> float:
    view = servers.view(ELASTIC)
    return view.resident_bytes / view.page_bytes


def pages_at_rest(servers: Servers) -> float:
    """Return the pages that a server holds two seconds after its last request, or few of them.

    What asks a server whether it is ready is a request, too.
    """
    deadline = time.monotonic() + 2
    while pages(servers) > NUM_PAGES_AT_REST and time.monotonic() < deadline:
        time.sleep(0.05)
    return pages(servers)


def check(model: Path, folder: Path, prompts: list[list[int]], *arguments: str) -> None:
    with Servers(folder) as servers:
        vanilla = start(servers, model, *arguments, elastic=False)
        ours = start(servers, model, *arguments, elastic=True)
        servers.wait_ready()
        after_start = pages_at_rest(servers)
        found = [[ask(server, prompts), ask(server, prompts)] for server in (vanilla, ours)]
        if "--disable-radix-cache" not in arguments:
            assert pages(servers) > 2
            ours.post("/flush_cache").raise_for_status()
        after_last = pages_at_rest(servers)
        again = ask(ours, prompts[:20])
    room = re.search(r"max_total_num_tokens=(\d+)", vanilla.log.read_text())
    assert room is not None
    assert int(room[1]) == VANILLA_TOKENS
    log = ours.log.read_text()
    assert "kvcached: process" in log
    assert "leak detected" not in log
    assert found[1] == found[0]
    assert len({tuple(tokens) for tokens in found[0][0]}) > len(prompts) // 4
    assert len(again) == 20
    assert max(after_start, after_last) <= NUM_PAGES_AT_REST


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_vanillas_and_memory_follows_the_load(tmp_path: Path, name: str) -> None:
    check(llama(), tmp_path, mixed_prompts(200, 900), *CASES[name])


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_tokens_of_other_models_are_vanillas(tmp_path: Path, name: str) -> None:
    make, arguments = OTHER_MODELS[name]
    prompts = [[3 + token % 500 for token in prompt] for prompt in mixed_prompts(200, 900)]
    check(save(make, tmp_path / "model"), tmp_path, prompts, *arguments)


@pytest.mark.parametrize(
    ("flags", "tags"),
    [((), ["kv_cache"]), (("--enable-memory-saver",), ["kv_cache", "cuda_graph"])],
    ids=["alone", "beside the memory saver"],
)
def test_released_memory_comes_back_with_the_next_request(
    tmp_path: Path, flags: tuple[str, ...], tags: list[str]
) -> None:
    """With `--enable-memory-saver` the KV cache is ours and the rest is the saver's."""
    prompts = mixed_prompts(20, 900)
    with Servers(tmp_path) as servers:
        server = start(servers, llama(), "--disable-radix-cache", *flags, elastic=True)
        server.wait_ready()
        before = ask(server, prompts)
        for verb in ("release", "resume"):
            server.post(f"/{verb}_memory_occupation", {"tags": tags}).raise_for_status()
            assert pages(servers) == 1
        assert ask(server, prompts) == before


def leave(num_bytes: int) -> Any:
    """Take all of the device but `num_bytes` for KV caches; return what holds it."""
    import torch

    free, total = torch.cuda.mem_get_info()
    size = free - num_bytes - int(HEADROOM * total)
    return torch.empty(max(size, 0), dtype=torch.uint8, device="cuda")


def fill(servers: Servers, name: str) -> None:
    """Let a server's prefix cache take most of the pages that `TOP_PAGES` leaves it."""
    source = random.Random(1)
    for _ in range(NUM_FILLS):
        if servers.resident_bytes(name) > FILLED_BYTES:
            return
        ask(servers[name], [[source.randrange(3, 1000) for _ in range(3000)] for _ in range(8)])
    raise AssertionError(f"the prefix cache does not take {FILLED_BYTES} bytes")


def test_a_full_neighbour_makes_room_for_a_start_and_a_sleeper_is_healthy(tmp_path: Path) -> None:
    eager, question = "--disable-cuda-graph", mixed_prompts(3, 900)[1:2]
    folder = Path(os.environ.get("GPU_CHECK_FOLDER", tmp_path))
    begin = time.monotonic()
    with written(folder / "sglang_start.json") as facts, Servers(tmp_path) as servers:
        took = facts["seconds"] = dict[str, float]()

        def reached(what: str) -> None:
            took[what] = time.monotonic() - begin

        neighbour = start(servers, llama(), eager, elastic=True, name="neighbour")
        neighbour.wait_ready()
        reached("neighbour ready")
        expected = ask(neighbour, question)
        ballast = leave(20 * GIB)
        fill(servers, "neighbour")
        reached("neighbour full")
        before = servers.resident_bytes("neighbour")
        comer = start(servers, llama(), eager, elastic=True, name="comer")
        facts["seen"] = seen = [asdict(servers.device())]
        comer.wait_ready(tick=lambda: seen.append(asdict(servers.device())))
        reached("comer ready")
        announced = max(row["static_bytes"] for device in seen for row in device["instances"])
        assert announced > WEIGHTS_BYTES
        assert before - servers.resident_bytes("neighbour") > WEIGHTS_BYTES // 2
        assert ask(comer, question) == expected
        comer.post("/release_memory_occupation", {"tags": ["kv_cache"]}).raise_for_status()
        facts["asleep"] = [httpx.get(f"{comer.url}/health", timeout=60).status_code for _ in "12"]
        comer.post("/resume_memory_occupation", {"tags": ["kv_cache"]}).raise_for_status()
        assert facts["asleep"] == [httpx.codes.OK, httpx.codes.OK]
        assert ask(comer, question) == expected
        reached("end")
        del ballast
