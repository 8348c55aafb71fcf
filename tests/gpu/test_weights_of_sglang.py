"""Real SGLang servers on the GPU whose weights are given and come back: the tokens stay.

Vanilla's server starts beside ours and ends before memory is counted. What was seen is written to
GPU_CHECK_FOLDER, also when a test fails.
"""

import os
from pathlib import Path

import pytest
from helpers.gpu_offline import mixed_prompts
from helpers.waiting import await_that
from helpers.weights import make_weights
from helpers.written import written

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
VANILLA_BYTES = 16 * GIB
WEIGHTS_BYTES = 16 * 10**9  # of Llama-3.1-8B's shape
NUM_TOKENS = 32
SECONDS = 60.0
CASES = {
    "graphs": (),
    "beside the memory saver": ("--enable-memory-saver",),
    "eager": ("--disable-cuda-graph",),
}


def start(servers: Servers, name: str, *arguments: str, elastic: bool) -> EngineServer:
    tokens = str(VANILLA_BYTES // (128 * 1024))
    sizes = ("--max-total-tokens", tokens, "--mem-fraction-static", "0.75")
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


def free_bytes() -> int:
    import torch

    return torch.cuda.mem_get_info()[0]


@pytest.mark.parametrize("name", CASES)
def test_tokens_stay_when_weights_went_and_came(tmp_path: Path, name: str) -> None:
    prompts = mixed_prompts(100, 900)
    folder = Path(os.environ.get("GPU_CHECK_FOLDER", tmp_path))
    free_at_first = free_bytes()
    with (
        written(folder / f"sglang-weights-{name.replace(' ', '-')}.json") as facts,
        Servers(tmp_path) as servers,
    ):
        vanilla = start(servers, "vanilla", *CASES[name], elastic=False)
        ours = start(servers, "ours", *CASES[name], elastic=True)
        facts["ready_seconds"] = servers.wait_ready()
        expected = [generate(vanilla.url, prompts, NUM_TOKENS) for _ in range(2)]
        free_beside = free_bytes()
        vanilla.kill()
        await_that(lambda: free_bytes() - free_beside > WEIGHTS_BYTES + VANILLA_BYTES, SECONDS)
        await_that(lambda: "may be given to neighbours" in ours.log.read_text(), SECONDS)

        def check(what: str) -> None:
            found = generate(ours.url, prompts, NUM_TOKENS)
            facts[what] = sum(map(list.__eq__, found, expected[1]))
            assert found == expected[1], f"{what}: {facts[what]} of {len(prompts)} are the same"

        def is_asleep() -> bool:
            slept = control.sleep("ours", directory=servers.directory, wait_seconds=SECONDS)
            return slept.outcome is Outcome.APPLIED

        facts["first"] = generate(ours.url, prompts, NUM_TOKENS) == expected[0]
        assert facts["first"]
        check("second")
        facts["memory"] = [line for line in ours.log.read_text().splitlines() if " end. " in line]
        free_before = free_bytes()
        for number in range(3):
            await_that(is_asleep, SECONDS)
            assert servers.view("ours").weights_bytes == 0
            freed, held = free_bytes() - free_before, free_at_first - free_bytes()
            facts |= {f"freed_bytes {number}": freed, f"held_bytes {number}": held}
            assert freed >= 0.9 * WEIGHTS_BYTES
            check(f"after sleep {number}")
        for verb in ("release", "resume"):
            ours.post(f"/{verb}_memory_occupation", {"tags": ["weights"]}).raise_for_status()
        check("after release and resume")
        assert ours.process.poll() is None
