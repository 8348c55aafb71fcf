"""Real vLLM engines on the GPU: the same tokens with us, and memory only for live tokens.

Every engine takes half a minute to start, so all that are asked for run at the same time, six at
once, each pair of vanilla and elastic on the same prompts. Elastic ones hand out the blocks at the
top of their reservation, where a kernel with 32-bit arithmetic would go wrong.
"""

import itertools
import json
import os
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from helpers.gpu_engine import run_engine
from helpers.gpu_runs import Runs, runs_of, write_brief

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).parents[1] / "helpers" / "gpu_offline.py"
NUM_AT_ONCE = int(os.environ.get("GPU_CHECK_ENGINES", "6"))
NUM_LARGE_AT_ONCE = int(os.environ.get("GPU_CHECK_LARGE", "4"))  # 27 GiB each


@dataclass(frozen=True)
class Case:
    """A model and how it is served.

    Attributes:
        shape: A name of `helpers.shapes`.
        runner: vLLM's model runner, 1 or 2; None leaves it to vLLM.
        options: What `gpu_offline.py` gets.
        environ: Settings of the elastic engine.
        shared_environ: Settings of both.
    """

    shape: str
    runner: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    shared_environ: dict[str, str] = field(default_factory=dict)


def llama(runner: int, *, eager: bool, caching: bool) -> Case:
    options = {"caching": caching, "engine": {"enforce_eager": eager}}
    return Case("llama-8b", runner, options | {"max_prompt": 500, "vanilla_kv_gib": 9})


EAGER = {"enforce_eager": True}
TRITON = EAGER | {"attention_backend": "TRITON_ATTN"}
SMALL = {"num_prompts": 60, "caching": False, "engine": EAGER}
LONG = SMALL | {"max_prompt": 2400}

CASES: dict[str, Case] = {
    f"8B V{runner} {'eager' if eager else 'graphs'} caching {'on' if caching else 'off'}": llama(
        runner, eager=eager, caching=caching
    )
    for runner, eager, caching in itertools.product((1, 2), (True, False), (False, True))
}
CASES |= {
    "triton": Case("llama-small", None, SMALL | {"engine": TRITON}),
    "mla": Case("mla", None, SMALL),
    "sliding": Case("sliding", None, LONG),
    "sliding caching on": Case("sliding", None, LONG | {"caching": True}),
    "sliding triton": Case("sliding", None, LONG | {"engine": TRITON}),
    "sinks": Case("sinks", None, LONG),
    "linear": Case("linear", None, LONG | {"engine": EAGER | {"gdn_prefill_backend": "triton"}}),
    "mamba": Case("mamba", None, LONG),
    "fp8": Case("llama-small", None, SMALL | {"engine": EAGER | {"kv_cache_dtype": "fp8"}}),
    **{
        f"{bits} with scales": Case(
            "llama-small",
            None,
            SMALL | {"engine": TRITON | {"kv_cache_dtype": f"{bits}_per_token_head"}},
        )
        for bits in ("int8", "fp8", "int4")
    },
    "blocks of 512": Case("llama-small", None, LONG | {"engine": EAGER | {"block_size": 512}}),
    "heads first": Case("llama-small", None, SMALL, shared_environ={"VLLM_KV_CACHE_LAYOUT": "HND"}),
    "cascade": Case(
        "llama-small",
        1,  # the second runner has no cascade attention
        LONG
        | {
            "caching": True,
            "cascade": True,
            "engine": EAGER | {"disable_cascade_attn": False},
        },
    ),
    "ngram": Case(
        "llama-small",
        None,
        SMALL
        | {
            "engine": EAGER
            | {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 3,
                    "prompt_lookup_max": 3,
                }
            }
        },
    ),
    "lora": Case(
        "llama-small", None, SMALL | {"engine": EAGER | {"enable_lora": True}, "lora": True}
    ),
    "sleep": Case(
        "llama-small",
        None,
        SMALL | {"engine": EAGER | {"enable_sleep_mode": True}, "sleep": True},
    ),
    **{
        f"sleep fp8 V{runner}": Case(
            "llama-small",
            runner,
            SMALL
            | {
                "engine": EAGER | {"enable_sleep_mode": True, "kv_cache_dtype": "fp8"},
                "sleep": True,
            },
        )
        for runner in (1, 2)
    },
    "preemption": Case(
        "llama-small",
        None,
        {"num_prompts": 200, "caching": False, "engine": EAGER},
        {"KVCACHED_LIMIT": "256MiB"},
    ),
}


def label_of(name: str, *, elastic: bool) -> str:
    return f"{name} {'elastic' if elastic else 'vanilla'}".replace(" ", "-")


LARGE = threading.Semaphore(NUM_LARGE_AT_ONCE)
ENGINES = threading.Semaphore(NUM_AT_ONCE)


def run(folder: Path, name: str, *, elastic: bool) -> Any:
    case = CASES[name]
    label = label_of(name, elastic=elastic)
    with LARGE if case.shape == "llama-8b" else nullcontext(), ENGINES:
        report = run_engine(
            SCRIPT,
            folder / label,
            case.shape,
            case.options | {"top": "KVCACHED_LIMIT" not in case.environ},
            case.shared_environ | ({"KVCACHED_DEBUG": "1"} | case.environ if elastic else {}),
            elastic=elastic,
            runner=case.runner,
        )
    brief = {key: value for key, value in report.items() if key not in ("tokens", "sleep")}
    brief["tokens_sha256"] = sha256(json.dumps(report["tokens"]).encode()).hexdigest()
    write_brief(folder, label, brief)
    return report


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    yield from runs_of(request, tmp_path_factory, run, 2 * len(CASES))


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_vanillas_and_memory_follows_the_load(runs: Runs, name: str) -> None:
    vanilla, ours = runs.reports(name)
    is_short_of_memory = "KVCACHED_LIMIT" in CASES[name].environ
    differing = [
        (round_number, index)
        for round_number in range(2)
        for index, tokens in enumerate(vanilla["tokens"][round_number])
        if tokens != ours["tokens"][round_number][index]
    ]
    if not is_short_of_memory:  # batches differ then, and with them bf16 sums
        assert differing == []
    if "cascade" in CASES[name].options:
        assert ours["num_cascades"] == vanilla["num_cascades"] > 0
    assert {len(tokens) for tokens in ours["tokens"][1]} == {32}
    assert len({tuple(tokens) for tokens in ours["tokens"][0]}) > len(ours["tokens"][0]) // 4
    page_bytes = ours["page_bytes"]
    assert ours["after_start"] == page_bytes
    if CASES[name].options["caching"]:
        assert ours["after_trim"] <= 2 * page_bytes
    else:
        assert ours["after_last"] <= 2 * page_bytes
    if not is_short_of_memory:
        assert ours["top_page"] >= ours["geometry"]["num_pages"] - 512
    label = label_of(name, elastic=True)
    (view,) = (view for view in ours["view"]["instances"] if view["name"] == label)
    assert view["promised_bytes"] == 0
    assert ours["steady"]["num_calls"] == 0
    if CASES[name].shape == "llama-8b":  # the others' pages hold more than this decodes
        assert ours["steady"]["num_mapped"] > 0


@pytest.mark.parametrize("name", ["sleep", "sleep fp8 V1", "sleep fp8 V2"])
def test_a_sleeping_engine_keeps_page_zero_and_wakes_to_the_same_tokens(
    runs: Runs, name: str
) -> None:
    vanilla, ours = runs.reports(name)
    for asleep in ours["sleep"]:
        assert asleep["asleep"] == ours["page_bytes"]
        assert asleep["tokens"] == ours["tokens"][0]
    if name == "sleep":
        assert [asleep["tokens"] for asleep in vanilla["sleep"]] == [vanilla["tokens"][0]] * 2
