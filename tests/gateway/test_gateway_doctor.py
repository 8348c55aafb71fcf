"""What `kvcached doctor` says of a file of models, before anything of it is started."""

import resource
import secrets
import socket
import sys
from pathlib import Path

import pytest
from helpers.gateway_steering import admin_running

from kvcached_gateway.admin import doctor
from kvcached_gateway.admin.doctor import Said, examine, findings
from kvcached_gateway.engines import runner
from kvcached_gateway.settings.config import Settings
from kvcached_patches import ENGINES

ENGINE_THERE = """
import json, sys
print("what an import may print")
print(json.dumps([[True, f"{sys.argv[1]} 1.0, every hook fits"]]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "a.safetensors").write_bytes(bytes(5000))
    return tmp_path


def settings(folder: Path, **values: object) -> Settings:
    return Settings.model_validate(
        {
            "path": folder / "models.yaml",
            "listen": "127.0.0.1:0",
            "environments": {"e": {"name": "e", "engine": "vllm", "python": sys.executable}},
            "models": {"one": {"id": "one", "environment": "e", "model": str(folder / "model")}},
            **values,
        }
    )


def said(found: Settings, folder: Path) -> list[Said]:
    return list(examine(found, folder / "kv"))


def problems(found: Settings, folder: Path) -> list[str]:
    return [text for is_good, text in said(found, folder) if not is_good]


def test_an_environment_is_asked_for_its_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "QUESTION", ENGINE_THERE)
    assert (True, "environment e (vllm): vllm 1.0, every hook fits") in said(
        settings(folder), folder
    )


def test_this_python_answers_for_itself(folder: Path) -> None:
    expected = [
        (False, f"vllm is not installed in {sys.executable}")
        if text == "not installed here"
        else (is_good, f"environment e (vllm): {text}")
        for is_good, text in ENGINES["vllm"].doctor_findings()
    ]
    found = said(settings(folder), folder)
    assert [each for each in found if "vllm" in each[1]] == expected


def test_an_engine_that_cannot_be_imported_is_a_problem(folder: Path) -> None:
    site = folder / "site"
    metadata = site / "kvcached_elastic-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[kvcached.doctor]\nvllm = says:findings\n")
    (site / "says.py").write_text("def findings():\n    return [(True, '1.0, every hook fits')]\n")
    (site / "vllm.py").write_text("raise ImportError('libcuda.so.1 is not there')\n")
    environment = {
        "name": "e",
        "engine": "vllm",
        "python": Path(sys._base_executable),  # type: ignore[attr-defined]  without what is here
        "env": {"PYTHONPATH": str(site)},
    }
    found = said(settings(folder, environments={"e": environment}), folder)
    told = [(is_good, text) for is_good, text in found if text.startswith("environment")]
    assert told == [
        (True, "environment e (vllm): 1.0, every hook fits"),
        (
            False,
            "environment e (vllm): `import vllm` fails: ImportError: libcuda.so.1 is not there",
        ),
    ]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("print(1); raise SystemExit('no such thing')", "ends with 1: no such thing"),
        ("", "ends with 0: nothing"),
        ("print('[[true, \"not installed here\"]]')", f"vllm is not installed in {sys.executable}"),
        ("print('[[false, \"a hook is missing\"]]')", "environment e (vllm): a hook is missing"),
    ],
)
def test_an_environment_without_its_engine_is_a_problem(
    folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    monkeypatch.setattr(doctor, "QUESTION", script)
    (problem,) = problems(settings(folder), folder)
    assert message in problem


def test_a_python_that_is_none_is_a_problem(folder: Path) -> None:
    environments = {"e": {"name": "e", "engine": "vllm", "python": folder / "model"}}
    (problem,) = problems(settings(folder, environments=environments), folder)
    assert "is no program; `python` has to name an interpreter" in problem


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "QUESTION", ENGINE_THERE)


@pytest.mark.usefixtures("quiet")
def test_nothing_is_wrong_with_what_is_right(folder: Path) -> None:
    assert problems(settings(folder), folder) == []
    assert not (folder / "kv").exists()


@pytest.mark.usefixtures("quiet")
def test_a_folder_without_a_model_is_a_problem(folder: Path) -> None:
    (folder / "model" / "config.json").unlink()
    (problem,) = problems(settings(folder), folder)
    assert problem.startswith("model one: ")
    assert problem.endswith("has no config.json")


@pytest.mark.usefixtures("quiet")
def test_labels_of_nodes_say_that_a_gateway_alone_reads_none(folder: Path) -> None:
    found = settings(folder)
    assert not any("`nodes`" in text for _, text in said(found, folder))
    model = found.models["one"].model_copy(update={"nodes": ("gpu=H100",)})
    labelled = found.model_copy(update={"models": {"one": model}})
    assert problems(labelled, folder) == []
    (text,) = [text for _, text in said(labelled, folder) if "`nodes`" in text]
    assert text.endswith("one gateway serves these anywhere: one")


@pytest.mark.usefixtures("quiet")
def test_a_socket_with_too_long_a_path_is_a_problem(folder: Path) -> None:
    (problem,) = [
        text
        for is_good, text in examine(settings(folder), Path("/dev/shm") / ("d" * 80))  # noqa: S108
        if not is_good
    ]
    assert "of 107 bytes: set KVCACHED_DIR shorter" in problem


def test_a_socket_is_as_long_as_the_one_that_an_engine_gets() -> None:
    assert len(doctor.OF_A_START) == len(f"-{secrets.token_hex(runner.NUM_BYTES)}")


@pytest.mark.usefixtures("quiet")
def test_an_address_that_somebody_has_is_a_problem(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        assert problems(settings(folder, listen=listen), folder) == [
            f"{listen} cannot be listened on: Address already in use"
        ]
        with admin_running(folder / "kv"):  # then it is the gateway's own
            assert problems(settings(folder, listen=listen), folder) == []


@pytest.mark.usefixtures("quiet")
def test_more_host_memory_than_there_is_is_a_problem(folder: Path) -> None:
    (problem,) = problems(settings(folder, host_memory=f"{1 << 50}"), folder)
    assert "may take 1048576 GiB (host_memory); a process may use " in problem


@pytest.mark.usefixtures("quiet")
def test_a_host_copy_that_fits_nowhere_is_a_problem(folder: Path) -> None:
    assert problems(settings(folder, host_memory="4000"), folder) == [
        "model one: its host copy, 4.88 KiB, is more than host_memory"
    ]
    assert problems(settings(folder, host_memory="4000", devices=["host"]), folder) == []


@pytest.mark.usefixtures("quiet")
def test_few_open_files_are_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    (problem,) = problems(settings(folder), folder)
    assert problem.startswith("1024 open files, for about 512 requests at once; raise it")


@pytest.mark.usefixtures("quiet")
def test_a_keys_file_with_a_mistake_is_a_problem(folder: Path) -> None:
    path = folder / "keys.yaml"
    path.write_text("a: {}")
    path.chmod(0o600)
    (problem,) = problems(settings(folder, keys_file=path), folder)
    assert problem.endswith("keys.yaml, line 1: a.sha256 is missing")


def test_without_a_gateway_and_a_file_there_is_nothing_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVCACHED_DIR", str(tmp_path / "kv"))
    (only,) = findings()
    assert only[0]
    assert "none runs" in only[1]


def test_where_no_gateway_is_installed_nothing_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "kvcached_gateway.settings.config_file", raising=False)
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.delitem(sys.modules, "kvcached_gateway.settings.yaml_file", raising=False)
    (only,) = findings()
    assert only[0]
    assert "pip install 'kvcached-elastic[gateway]'" in only[1]


def test_the_file_here_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVCACHED_DIR", str(tmp_path / "kv"))
    (tmp_path / "models.yaml").write_text("workers: no")
    (only,) = findings()
    assert not only[0]
    assert "workers='no' is not allowed" in only[1]


def test_the_file_of_the_gateway_that_runs_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHED_DIR", str(tmp_path))
    with admin_running(tmp_path):
        first, second = findings()
    assert first == (True, f"one serves /etc/models.yaml from {tmp_path}")
    assert "/etc/models.yaml cannot be read" in second[1]
