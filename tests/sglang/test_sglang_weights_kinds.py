"""Weights that two ranks share, that are tied, or that are of latent attention."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.sglang_engine import Models
from helpers.sglang_models import deepseek
from helpers.sglang_weights import PAGE, start_yielding
from helpers.waiting import PATIENCE_SECONDS, await_that

from kvcached_core import control
from kvcached_core.control import Outcome
from kvcached_demo.harness.model import CONFIG, make_model
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

NAME = "yielding"
NUM_PAGES = 40
PROMPTS = [[5, 6, 7, 8], [9] * 40, list(range(11, 60))]


def tied(folder: Path) -> Path:
    make_model(folder, seed=1)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    return folder


def ask(server: EngineServer, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    sampling = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
    body = {"input_ids": prompts, "sampling_params": sampling}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=PATIENCE_SECONDS)
    answer.raise_for_status()
    return [one["output_ids"] for one in answer.json()]


def check_cycles(servers: Servers, ask_all: Callable[[], Any]) -> None:
    """See that answers are the same when all weights have gone and come."""
    before, whole = ask_all(), servers.view(NAME).weights_bytes
    assert whole > 2 * PAGE

    def is_asleep() -> bool:
        slept = control.sleep(NAME, directory=servers.directory, wait_seconds=PATIENCE_SECONDS)
        return slept.outcome is Outcome.APPLIED

    for _ in range(2):
        await_that(is_asleep)
        assert servers.view(NAME).weights_bytes == 0
        assert ask_all() == before
        assert servers.view(NAME).weights_bytes == whole
    log = servers[NAME].log.read_text()
    assert "0 B stay where they were" in log
    assert servers[NAME].process.poll() is None


def test_both_ranks_give_and_get_their_weights(model: Path, tmp_path: Path) -> None:
    with Servers(tmp_path, NUM_PAGES * PAGE) as servers:
        server = start_yielding(servers, NAME, model, num_ranks=2)
        check_cycles(servers, lambda: ask(server))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    with Servers(tmp_path, NUM_PAGES * PAGE) as servers:
        server = start_yielding(servers, NAME, tied(tmp_path / "tied"))
        check_cycles(servers, lambda: ask(server))


@pytest.mark.newest_release  # 0.5.15 cannot import its own DeepSeek models on a CPU
def test_weights_of_latent_attention(models: Models, tmp_path: Path) -> None:
    with Servers(tmp_path, NUM_PAGES * PAGE) as servers:
        flags = ("--disable-radix-cache", "--attention-backend", "triton")  # which is interpreted
        server = start_yielding(servers, NAME, models(deepseek), *flags)
        check_cycles(servers, lambda: ask(server, PROMPTS[:1]))
