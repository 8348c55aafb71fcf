"""Real SGLang servers on the GPU whose weights are given and come back: the tokens stay."""

import os
from pathlib import Path

import pytest
from helpers.gpu_offline import mixed_prompts
from helpers.waiting import await_that
from helpers.weights import make_weights

from kvcached_core import control
from kvcached_core.control import Outcome
from kvcached_core.units import GIB
from kvcached_demo.harness.engines import SGLANG
from kvcached_demo.harness.load import generate
from kvcached_demo.harness.server import EngineServer
from kvcached_demo.harness.servers import Servers

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(500)]

MODELS = Path(os.environ.get("GPU_CHECK_MODELS", "/dev/shm/kvcached-models"))  # noqa: S108
OPTIONS = (
    *(*SGLANG.gpu_options(4096), "--skip-tokenizer-init", "--skip-server-warmup"),
    *("--cuda-graph-max-bs-decode", "64", "--disable-radix-cache"),
)
# Both have room for all prompts of a round, or they would schedule them differently.
VANILLA_TOKENS = 16 * GIB // (128 * 1024)
WEIGHTS_BYTES = 16 * 10**9  # of Llama-3.1-8B's shape
NUM_TOKENS = 32
SECONDS = 60.0
CASES = {
    "graphs": (),
    "eager": ("--disable-cuda-graph",),
    "beside the memory saver": ("--enable-memory-saver",),
}


def start(servers: Servers, name: str, *arguments: str, elastic: bool) -> EngineServer:
    sizes = ("--max-total-tokens", str(VANILLA_TOKENS), "--mem-fraction-static", "0.75")
    return servers.start(
        SGLANG,
        name,
        make_weights(MODELS / "llama-8b", "llama-8b"),
        *arguments,
        *(() if elastic else sizes),
        is_elastic=elastic,
        options=OPTIONS,
        environ={"KVCACHED_WEIGHTS": "yield", "KVCACHED_WEIGHTS_KEPT_SECONDS": "0"},
    )


@pytest.mark.parametrize("name", CASES)
def test_tokens_stay_when_weights_went_and_came(tmp_path: Path, name: str) -> None:
    prompts = mixed_prompts(100, 900)
    with Servers(tmp_path) as servers:
        vanilla = start(servers, "vanilla", *CASES[name], elastic=False)
        vanilla.wait_ready()
        expected = [generate(vanilla.url, prompts, NUM_TOKENS) for _ in range(2)]
        vanilla.kill()
        ours = start(servers, "ours", *CASES[name], elastic=True)
        ours.wait_ready()
        await_that(lambda: "may be given to neighbours" in ours.log.read_text(), SECONDS)
        assert [generate(ours.url, prompts, NUM_TOKENS) for _ in range(2)] == expected
        free_before = servers.device().free_bytes

        def is_asleep() -> bool:
            slept = control.sleep("ours", directory=servers.directory, wait_seconds=SECONDS)
            return slept.outcome is Outcome.APPLIED

        for _ in range(3):
            await_that(is_asleep, SECONDS)
            assert servers.view("ours").weights_bytes == 0
            free_bytes = servers.device().free_bytes
            assert free_before is not None
            assert free_bytes is not None
            assert free_bytes - free_before >= 0.9 * WEIGHTS_BYTES
            assert generate(ours.url, prompts, NUM_TOKENS) == expected[1]
        for verb in ("release", "resume"):
            ours.post(f"/{verb}_memory_occupation", {"tags": ["weights"]}).raise_for_status()
        assert generate(ours.url, prompts, NUM_TOKENS) == expected[1]
        assert ours.process.poll() is None
