"""Real SGLang servers on the GPU: vanilla's tokens with the flag, and memory only for live tokens.

All prompts of a round come in one message, so that both servers schedule them alike. The elastic
one hands out the blocks at the top of its reservation.
"""

import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.gpu_offline import mixed_prompts
from helpers.sglang_models import deepseek, laguna, lfm2, save
from helpers.weights import make_weights

from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import GIB
from kvcached_demo.harness.server import SGLangServer

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(500)]

MODELS = Path(os.environ.get("GPU_CHECK_MODELS", "/dev/shm/kvcached-models"))  # noqa: S108
PYTHON = os.environ.get("SGLANG_PYTHON", sys.executable)
TOP_PAGES = Path(__file__).parents[1] / "helpers" / "top_pages"
OPTIONS = (
    *("--dtype", "bfloat16", "--context-length", "4096", "--attention-backend", "triton"),
    *("--sampling-backend", "pytorch", "--grammar-backend", "none", "--skip-tokenizer-init"),
    *("--skip-server-warmup", "--log-level", "info", "--cuda-graph-max-bs-decode", "64"),
)
# Both have room for all prompts of a round, or they would schedule them differently. On a card of
# 80 GB a fraction of 0.45 leaves 35,000 tokens beside two models, whatever is asked for.
VANILLA_TOKENS = 16 * GIB // (128 * 1024)
NUM_TOKENS = 32
NUM_PAGES_AT_REST = 2

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


@dataclass
class Server:
    """A server and its folder."""

    process: SGLangServer
    folder: Path

    def ask(self, prompts: list[list[int]]) -> list[list[int]]:
        sampling = {"temperature": 0.0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
        body = {"input_ids": prompts, "sampling_params": sampling}
        answer = httpx.post(f"{self.process.url}/generate", json=body, timeout=240)
        answer.raise_for_status()
        return [one["output_ids"] for one in answer.json()]

    def view(self) -> InstanceView:
        (path,) = (self.folder / "kv").glob("*.ledger")
        with Ledger(path) as ledger:
            (view,) = ledger.view().instances
            return view


def llama() -> Path:
    return make_weights(MODELS / "llama-8b", "llama-8b")


def start(model: Path, folder: Path, *arguments: str, elastic: bool) -> Server:
    name = "elastic" if elastic else "vanilla"
    flags = ("--enable-kvcached", "--kvcached-name", name)
    sizes = ("--max-total-tokens", str(VANILLA_TOKENS), "--mem-fraction-static", "0.75")
    server = SGLangServer(
        name,
        model,
        folder,
        environ={
            "ENABLE_KVCACHED": "0",
            "KVCACHED_DIR": str(folder / "kv"),
            "PYTHONPATH": str(TOP_PAGES) if elastic else "",
            "SGLANG_USE_CPU_ENGINE": "0",
            "TMPDIR": "/tmp",  # noqa: S108  sockets need a short path
        },
        arguments=(*arguments, *(flags if elastic else sizes)),
        options=OPTIONS,
        python=PYTHON,
    )
    return Server(server, folder)


def pages(server: Server) -> float:
    view = server.view()
    return view.resident_bytes / view.page_bytes


def pages_at_rest(server: Server) -> float:
    """Return the pages that a server holds two seconds after its last request, or few of them.

    What asks a server whether it is ready is a request, too.
    """
    deadline = time.monotonic() + 2
    while pages(server) > NUM_PAGES_AT_REST and time.monotonic() < deadline:
        time.sleep(0.05)
    return pages(server)


def check(model: Path, folder: Path, prompts: list[list[int]], *arguments: str) -> None:
    servers = [start(model, folder, *arguments, elastic=elastic) for elastic in (False, True)]
    found: list[Any] = []
    try:
        for server in servers:
            server.process.wait_ready(240)
        ours = servers[1]
        after_start = pages_at_rest(ours)
        found = [[server.ask(prompts), server.ask(prompts)] for server in servers]
        if "--disable-radix-cache" not in arguments:
            assert pages(ours) > 2
            httpx.post(f"{ours.process.url}/flush_cache").raise_for_status()
        after_last = pages_at_rest(ours)
        again = ours.ask(prompts[:20])
    finally:
        for server in servers:
            server.process.kill()
    room = re.search(r"max_total_num_tokens=(\d+)", servers[0].process.log.read_text())
    assert room is not None
    assert int(room[1]) == VANILLA_TOKENS
    log = ours.process.log.read_text()
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
    server = start(llama(), tmp_path, "--disable-radix-cache", *flags, elastic=True)
    prompts = mixed_prompts(20, 900)
    try:
        server.process.wait_ready(240)
        before = server.ask(prompts)
        url = server.process.url
        for verb in ("release", "resume"):
            address = f"{url}/{verb}_memory_occupation"
            httpx.post(address, json={"tags": tags}, timeout=60).raise_for_status()
            assert pages(server) == 1
        assert server.ask(prompts) == before
    finally:
        server.process.kill()
