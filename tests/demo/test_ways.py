"""The examples' files can be served, and each way to use the gateway runs as its README says."""

import asyncio
import os
import runpy
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
from helpers.documents import ROOT, blocks
from helpers.gateway_life import ENVIRON, launch_warm, short_folder

from kvcached_demo.harness.tiny import NAMES, make_tiny_models
from kvcached_demo.harness.way import Gateway, served
from kvcached_gateway.serve import serving
from kvcached_gateway.settings.config_file import read_settings

EXAMPLES = ROOT / "examples"
MODELS = sorted(file for way in EXAMPLES.glob("*/cpu.yaml") for file in way.parent.glob("*.yaml"))
WAYS = sorted(path.parent.name for path in EXAMPLES.glob("*/run.py"))
SHORTEST = "serverless"  # under `make test`; the others before a release
SAID = {
    "several_models": "one after the other:",
    "agents": "round 3: reviewer",
    "retrieval": "tokens of an answer",
    "fine_tuning": "tuned goes on with",
    "serverless": "nobody asked:",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples, with tiny models, and this environment where `make setup` makes it."""
    root = tmp_path_factory.mktemp("tree")
    for file in MODELS:
        (root / "examples" / file.parent.name).mkdir(parents=True, exist_ok=True)
        text = file.read_text().replace("../../.venv/bin/python", sys.executable)
        (root / "examples" / file.parent.name / file.name).write_text(text)
    make_tiny_models(root / "examples" / "tiny")
    return root / "examples"


@pytest.mark.parametrize("file", MODELS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_example_file_can_be_read_and_names_models_that_there_are(file: Path) -> None:
    settings = read_settings(file)
    assert settings.models
    for model in settings.models.values():
        if "tiny" in Path(model.model or "").parts:
            assert Path(model.model or "").name in NAMES


def test_each_way_has_a_file_for_both_machines_and_one_command() -> None:
    assert set(WAYS) == set(SAID)
    for way in WAYS:
        assert {"cpu.yaml", "gpu.yaml"} <= {path.name for path in (EXAMPLES / way).iterdir()}
        assert [f"make example-{way}"] in blocks(EXAMPLES / way / "README.md")
        cpu, gpu = (read_settings(EXAMPLES / way / name) for name in ("cpu.yaml", "gpu.yaml"))
        assert set(cpu.models) == set(gpu.models)


def test_images_name_what_there_is() -> None:
    for file in (EXAMPLES / "gateway").glob("Dockerfile.*"):
        lines = [line.split() for line in file.read_text().splitlines() if line]
        words = [line[0] for line in lines if line[0] != "#"]
        assert set(words) <= {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "EXPOSE", "ENTRYPOINT"}
        for line in lines:
            if line[0] == "COPY":
                assert all((ROOT / source).exists() for source in line[1:-1])


def test_the_unit_starts_and_reloads_with_commands_that_there_are() -> None:
    unit = ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(EXAMPLES / "gateway" / "kvcached-gateway.service")
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    service = unit["Service"]
    for key in ("ExecStart", "ExecReload"):
        program, command, *_ = service[key].split()
        assert Path(program).name == "kvcached"
        assert command in {"serve", "reload"}
    # Engines outlive a gateway that was killed, so that the next one finds them.
    assert service["KillMode"] == "process"
    assert service["Environment"] == f"KVCACHED_DIR=/run/{service['RuntimeDirectory']}"


async def show_with_warm_engines(way: str, file: Path, directory: Path) -> None:
    """Serve a file in this process, its engines forked from one that has imported them."""
    show = runpy.run_path(str(EXAMPLES / way / "run.py"))["show"]
    async with serving(file, directory, environ=os.environ | ENVIRON, launch=launch_warm) as here:
        gateway = Gateway(f"http://127.0.0.1:{here.port}", directory, file.parent)
        await asyncio.to_thread(show, gateway)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=() if way == SHORTEST else pytest.mark.every_release) for way in WAYS],
)
def test_a_way_shows_what_its_readme_says(
    tree: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with short_folder() as folder:
        asyncio.run(show_with_warm_engines(way, tree / way / "cpu.yaml", folder / "kv"))
    assert SAID[way] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.every_release
@pytest.mark.parametrize("way", WAYS)
def test_a_way_runs_by_its_command(way: str) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / way / "run.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert SAID[way] in done.stdout


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.every_release
def test_the_quick_start_and_the_openai_recipe_work_as_written(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe,) = [b for b in blocks(ROOT / "docs" / "gateway.md") if b[0].startswith("from openai")]
    file = tree / "gateway" / "cpu.yaml"
    file.write_text("listen: 127.0.0.1:0\n" + file.read_text())
    with served(file, tmp_path) as gateway:
        code = "\n".join(recipe).replace("http://127.0.0.1:8080", gateway.url)
        names: dict[str, Any] = {}
        exec(code, names)  # noqa: S102  the document's own lines
        names["client"].close()
    assert capsys.readouterr().out.strip()
