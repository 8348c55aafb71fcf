"""Starting SGLang: off changes nothing, the flag works, and what cannot be served is said first."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.nursery import SGLANG_ENVIRON, run_warm

from kvcached_core.engine.start import check
from kvcached_core.errors import UnsupportedEngineError
from kvcached_patches import ENGINES
from kvcached_patches.sources import Sources
from kvcached_sglang import obstacles

pytestmark = pytest.mark.sglang

SGLANG: Any = ENGINES["sglang"]

PARSE = """
import os, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
from kvcached_sglang.startup import startup
try:
    print("one pool", prepare_server_args(sys.argv[1:]).disable_hybrid_swa_memory)
finally:
    import sglang.srt.entrypoints.engine
    import sglang.srt.mem_cache.allocator.token
    names = startup.applied.applied if startup.applied else []
    print("applied", len(names))
    print({name: value for name, value in os.environ.items() if "KVCACHED" in name})
"""

PARSE_ONLY = PARSE[: PARSE.index("from kvcached_sglang")] + "prepare_server_args(sys.argv[1:])"


def variables(**environ: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if "KVCACHED" not in name}
    return kept | SGLANG_ENVIRON | environ


def run(script: str, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run a script where SGLang is imported already: hooks are applied at once."""
    return run_warm("sglang", ["-c", script, *arguments], variables(**environ))


def run_cold(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a script which imports SGLang: hooks are applied behind the import of each module."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=variables(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_flags_are_in_the_help() -> None:
    done = run(PARSE, "--help")
    for flag in ("--enable-kvcached", "--kvcached-limit", "--kvcached-floor"):
        assert flag in done.stdout
    assert "--kvcached-priority" in done.stdout
    assert "--kvcached-name" in done.stdout


def test_without_the_flag_nothing_is_patched(model: Any) -> None:
    done = run(PARSE, "--model-path", str(model), "--device", "cpu")
    assert "applied 0" in done.stdout, done.stderr
    assert "one pool False" in done.stdout


def test_the_flag_patches_and_reaches_spawned_processes(model: Any) -> None:
    done = run_cold(
        PARSE,
        *("--model-path", str(model), "--device", "cpu", "--enable-kvcached"),
        *("--kvcached-limit", "1GiB", "--kvcached-name", "here", "--kvcached-priority", "3"),
    )
    assert "applied 0" not in done.stdout
    assert "'ENABLE_KVCACHED': '1'" in done.stdout, done.stderr
    assert "one pool False" in done.stdout
    assert "'KVCACHED_LIMIT': '1GiB'" in done.stdout
    assert "'KVCACHED_NAME': 'here'" in done.stdout
    assert "'KVCACHED_PRIORITY': '3'" in done.stdout


def test_flags_in_sglangs_configuration_file_do_the_same(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(
        f"model-path: {model}\ndevice: cpu\nenable-kvcached: true\nkvcached-limit: 1GiB\n"
        "kvcached-priority: 3\n"
    )
    done = run(PARSE, "--config", str(file))
    assert "'ENABLE_KVCACHED': '1'" in done.stdout, done.stderr
    assert "'KVCACHED_LIMIT': '1GiB'" in done.stdout
    assert "'KVCACHED_PRIORITY': '3'" in done.stdout


def test_a_refused_flag_of_sglangs_ends_the_start_with_one_message(model: Any) -> None:
    tier = ("--enable-hierarchical-cache", "--hicache-storage-backend", "mooncake")
    refused = ("--enable-kvcached", *tier, "--dcp-size", "2")
    done = run(PARSE_ONLY, "--model-path", str(model), "--device", "cpu", *refused)
    assert done.returncode == 1
    assert done.stderr.count("kvcached: ") == 1
    assert "HiCache storage backend mooncake: nobody has tried it" in done.stderr
    assert "set --dcp-size 1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("switch", ["0", "1", "auto"])
def test_a_server_that_only_encodes_says_once_that_nothing_of_it_is_elastic(
    model: Any, switch: str
) -> None:
    encoder = ("--model-path", str(model), "--device", "cpu", "--encoder-only")
    done = run(PARSE_ONLY, *encoder, ENABLE_KVCACHED=switch)
    num_said = done.stderr.count("nothing of this server is elastic: it only encodes")
    assert num_said == (switch != "0")


@pytest.mark.parametrize("switch", ["1", "auto"])
def test_the_variable_patches_as_the_flag_does(model: Any, switch: str) -> None:
    done = run(PARSE, "--model-path", str(model), "--device", "cpu", ENABLE_KVCACHED=switch)
    assert "applied 0" not in done.stdout
    assert "one pool False" in done.stdout, done.stderr


def test_bad_settings_end_the_process_although_sglang_swallows_exceptions() -> None:
    done = run(PARSE, "--help", ENABLE_KVCACHED="maybe")
    assert done.returncode == 1
    assert "ENABLE_KVCACHED='maybe' is not allowed; use 0, 1 or auto" in done.stderr


def test_every_hook_fits_the_installed_release(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert SGLANG.misfit(SGLANG.installed()) == ""
    monkeypatch.setattr(Sources, "tree", None)  # and what is as it was locked is not parsed
    assert SGLANG.misfit(SGLANG.installed()) == ""


@pytest.mark.parametrize(
    "release",
    [
        pytest.param("0.5.5", marks=pytest.mark.every_release),
        pytest.param("0.6.0", marks=pytest.mark.every_release),
        "0.5.24",
    ],
)
def test_other_releases_are_refused_with_those_that_are_served(release: str) -> None:
    misfit = SGLANG.misfit(replace(SGLANG.installed(), release=release))
    assert re.search(r"no lock.*\n.*0\.5\.12\.post1, .*0\.5\.23", misfit)


def runner(**changes: Any) -> Any:
    arguments = {name: allowed for name, (allowed, _) in obstacles.OBSTACLES.items()}
    arguments |= {"max_mamba_cache_size": None}
    return SimpleNamespace(
        server_args=SimpleNamespace(**{**arguments, **changes}),
        device="cpu",
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(architectures=[changes.get("model", "LlamaForCausalLM")]),
            hf_text_config=SimpleNamespace(sliding_window=64),
        ),
        is_hybrid_swa=changes.get("is_hybrid_swa", False),
        mambaish_config=changes.get("mambaish_config"),
    )


def obstacles_of(runner: Any) -> list[str]:
    found = obstacles.argument_obstacles(runner.server_args), obstacles.model_obstacles(runner)
    return [*found[0], *found[1]]


OFFLOADING = {"enable_hierarchical_cache": True, "hicache_size": 1}
HYBRID = {"mambaish_config": object()}
MIX = {"is_hybrid_swa": True, "attention_backend": "fa3"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attn_dp_size": 1, "dwdp_size": 1, "enable_dp_attention": True},
        {"dp_size": 2},
        {"attn_dp_size": 2},
        {"attn_dp_size": 2, "elastic_ep_backend": "none"},
        {"attn_dp_size": 2, "speculative_algorithm": "EAGLE3", **OFFLOADING},
        {"attn_dp_size": 1, "dp_size": 2, "enable_dp_attention": True},
        {"pp_size": 2},
        {"pp_size": 2, "dp_size": 2, **OFFLOADING},
        {"pp_size": 2, "speculative_algorithm": "EAGLE"},
        {"dp_size": 2, "speculative_algorithm": "STANDALONE", **OFFLOADING},
        {"speculative_algorithm": "NGRAM", **HYBRID},
        {"speculative_algorithm": "STANDALONE", **HYBRID, **OFFLOADING},
        {"dp_size": 2, **HYBRID},
        {"dp_size": 2, **MIX},
        {"dp_size": 2, "speculative_algorithm": "NGRAM", **OFFLOADING},
        {"speculative_algorithm": "EAGLE", **OFFLOADING},
        {"is_hybrid_swa": True, "attention_backend": "fa3", "model": "MiMoV2FlashForCausalLM"},
        {"is_hybrid_swa": False, "model": "LagunaForCausalLM"},
        HYBRID,
        HYBRID | {"max_mamba_cache_size": 20},
        HYBRID | MIX | {"max_mamba_cache_size": 20},
    ],
)
def test_plain_models_mixes_and_hybrids_are_served(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """As with a release whose copies of several pools we see: older ones are another test's."""
    monkeypatch.setattr("kvcached_sglang.host_tier._TRANSFERS_MODULE", "kvcached_sglang.host_tier")
    check(obstacles_of(runner(**changes)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dcp_size": 2}, "set --dcp-size 1"),
        (
            {"dp_size": 2, "enable_memory_saver": True},
            "with --enable-memory-saver: nobody has tried it; set --dp-size 1",
        ),
        (
            {"pp_size": 2, "enable_memory_saver": True},
            "with --enable-memory-saver: nobody has tried it; set --pp-size 1",
        ),
        (MIX | {"pp_size": 2}, "sliding windows or states: nobody has tried it; set --pp-size"),
        (HYBRID | {"pp_size": 2}, "sliding windows or states: nobody has tried it; set --pp-size"),
        (
            {"pp_size": 2, "speculative_algorithm": "NGRAM"},
            "pipeline parallelism with --speculative-algorithm: SGLang itself serves EAGLE alone",
        ),
        (
            {"attn_dp_size": 2, "enable_memory_saver": True},
            "with --enable-memory-saver: nobody has tried it; set --attn-dp-size 1",
        ),
        ({"attn_dp_size": 2, "pp_size": 2}, "set --attn-dp-size 1, or set --pp-size 1"),
        (
            MIX | {"attn_dp_size": 2},
            "sliding windows or states: nobody has tried it; set --attn-dp",
        ),
        ({"dwdp_size": 2}, "set --dwdp-size 1"),
        (
            {"attn_dp_size": 2, "elastic_ep_backend": "mooncake"},
            "ranks come and go; remove --elastic-ep-backend",
        ),
        (
            {"dp_size": 2, "enable_dp_attention": True},
            "nobody has tried it with this release; install SGLang 0.5.23, or remove",
        ),
        (OFFLOADING | {"hicache_storage_backend": "nixl"}, "remove --enable-hierarchical-cache"),
        ({"disaggregation_mode": "prefill"}, "--disaggregation-mode null"),
        ({"enable_pdmux": True}, "remove --enable-pdmux"),
        ({"kv_canary": "raise"}, "set --kv-canary none"),
        ({"radix_cache_backend": "flexkv"}, "remove --radix-cache-backend"),
        ({"enable_return_routed_experts": True}, "remove --enable-return-routed-experts"),
        ({"enable_return_indexer_topk": True}, "remove --enable-return-indexer-topk"),
        ({"use_ray": True}, "remove --use-ray"),
        (
            {"enable_unified_cache_external_linker": True},
            "remove --enable-unified-cache-external-linker",
        ),
        (
            {"speculative_algorithm": "DFLASH"},
            "set --speculative-algorithm to one of EAGLE, EAGLE3",
        ),
        (
            {"speculative_algorithm": "EAGLE", "is_hybrid_swa": True},
            "speculative decoding of a model with sliding windows or states",
        ),
        (
            {"is_hybrid_swa": False, "model": "MiMoV2FlashForCausalLM"},
            "remove --disable-hybrid-swa-memory, which is right for GptOssForCausalLM, Laguna",
        ),
        (
            {"is_hybrid_swa": True, "attention_backend": "torch_native"},
            "set --attention-backend to one of fa3, fa4, flashinfer, triton, trtllm_mha",
        ),
        (HYBRID | MIX, "set --max-mamba-cache-size"),
        (
            {"mambaish_config": SimpleNamespace(short_conv_layer_ids=[0])},
            "found by the same numbers; set --max-mamba-cache-size",
        ),
    ],
)
def test_what_cannot_be_served_is_named_with_the_setting(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedEngineError, match="cannot be served elastically") as caught:
        check(obstacles_of(runner(**changes)))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "made", "reason"),
    [
        ({}, {"attn_cp_size": 2}, "set --attn-cp-size 1"),
        (MIX | {"attention_backend": None}, {"attention_backend": "torch_native"}, "torch_native"),
    ],
)
def test_what_sglang_makes_of_its_arguments_is_refused_as_what_was_given(
    changes: dict[str, Any], made: dict[str, Any], reason: str
) -> None:
    if find_spec("sglang.srt.arg_groups.model_override_base") is None:
        pytest.skip("this release writes it into its record of arguments")
    from sglang.srt.arg_groups.overrides import declare_resolution

    asking = runner(**changes)
    assert obstacles_of(asking) == []
    declare_resolution(asking.server_args, "a model's own setting", **made)
    (found,) = obstacles_of(asking)
    assert reason in found


def test_weights_stay_for_what_sglang_sets_itself() -> None:
    if find_spec("sglang.srt.arg_groups.model_override_base") is None:
        pytest.skip("this release writes it into its record of arguments")
    from sglang.srt.arg_groups.overrides import declare_resolution

    given = runner(load_format="auto").server_args
    assert list(obstacles.weight_obstacles(given)) == []
    declare_resolution(given, "a model's own setting", ple_offload_embedding=True)
    (found,) = obstacles.weight_obstacles(given)
    assert "--no-ple-offload-embedding" in found


@pytest.mark.parametrize(
    ("value", "device", "is_refused"),
    [("1", "cuda", True), ("True", "cuda", True), ("0", "cuda", False), ("1", "cpu", False)],
)
def test_a_pool_that_sglang_sizes_when_graphs_are_captured_is_refused_where_it_does_so(
    monkeypatch: pytest.MonkeyPatch, value: str, device: str, *, is_refused: bool
) -> None:
    monkeypatch.setenv("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", value)
    made = runner()
    made.device = device
    reasons = obstacles_of(made)
    assert len(reasons) == is_refused
    assert all(f"POST_CAPTURE_KV_SIZING={value}: " in one for one in reasons)
