"""The examples' files can be served, and each way to use the gateway runs as its README says."""

import asyncio
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from helpers.documents import ROOT, blocks
from helpers.gateway_life import ENVIRON, launch_warm, short_folder
from helpers.waiting import await_that

from kvcached_core.memory.model_bytes import files_bytes
from kvcached_core.memory.request_bytes import request_bytes
from kvcached_core.units import parse_bytes
from kvcached_demo.harness.server import free_port
from kvcached_demo.harness.tiny import NAMES, make_tiny_models
from kvcached_demo.harness.way import Gateway, served
from kvcached_gateway.serve import serving
from kvcached_gateway.settings.config_file import read_settings

EXAMPLES = ROOT / "examples"
NO_MODELS = {EXAMPLES / "ray" / "serve.yaml"}  # an application of Ray Serve
MODELS = sorted(
    {file for way in EXAMPLES.glob("*/cpu.yaml") for file in way.parent.glob("*.yaml")} - NO_MODELS
)
WAYS = sorted(path.parent.name for path in EXAMPLES.glob("*/run.py"))
LITELLM_PYTHON = os.environ.get("LITELLM_PYTHON", ROOT / ".venv-litellm" / "bin" / "python")
LITELLM_SECONDS = 300.0
LITELLM_ENVIRON = {
    "KVCACHED_KEY": "none",  # what the recipe calls the key; this gateway needs none
    "PYTHONPATH": "",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}
SHORTEST = "serverless"  # under `make test`; the others before a release
NUM_AGENTS = 3
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


def test_the_longest_request_of_an_agent_fits_beside_the_first_pages_of_the_others(
    tree: Path,
) -> None:
    """Else the gateway stops one of the engines, all of which stay alive as the README says."""
    settings = read_settings(tree / "agents" / "cpu.yaml")
    environment = settings.environments["vllm"]
    pool_bytes, page_bytes = (
        parse_bytes(environment.env[name], what=name)
        for name in ("KVCACHED_HOST_POOL", "KVCACHED_PAGE_BYTES")
    )
    num_tokens, block_tokens = (
        int(environment.args[environment.args.index(name) + 1])
        for name in ("--max-model-len", "--block-size")
    )
    for model in settings.models.values():
        folder = Path(model.model or "")
        longest_bytes = request_bytes(folder, num_tokens)
        first_bytes = max(page_bytes, longest_bytes * block_tokens // num_tokens)
        others_bytes = (len(settings.models) - 1) * first_bytes
        assert files_bytes(folder) + longest_bytes + others_bytes <= pool_bytes


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
    said = capsys.readouterr().out
    assert SAID[way] in said
    if way == "agents":
        later = [line for line in said.splitlines() if line.startswith(("round 2", "round 3"))]
        assert len(later) == 2 * NUM_AGENTS
        assert {line.rpartition(" ")[2] for line in later} <= {"wake", "none"}


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


@pytest.fixture(scope="module")
def quick_start(tree: Path) -> Iterator[Gateway]:
    """The gateway of the first file of the examples, started as its README says."""
    file = tree / "gateway" / "cpu.yaml"
    file.write_text("listen: 127.0.0.1:0\n" + file.read_text())
    with short_folder() as folder, served(file, folder) as gateway:
        yield gateway


def recipe(first: str, gateway: Gateway) -> str:
    """Return the recipe that begins so, with the address of a gateway."""
    (found,) = [b for b in blocks(ROOT / "docs" / "gateway.md") if b[0].startswith(first)]
    return "\n".join(found).replace("http://127.0.0.1:8080", gateway.url)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.every_release
def test_the_quick_start_and_the_openai_recipe_work_as_written(
    quick_start: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    exec(recipe("from openai", quick_start), names)  # noqa: S102  the document's own lines
    names["client"].close()
    assert capsys.readouterr().out.strip()


@contextmanager
def litellm(config: Path) -> Iterator[str]:
    """Run LiteLLM's proxy as a file says; yield its address."""
    port, log = free_port(), config.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [Path(LITELLM_PYTHON).with_name("litellm"), "--config", config, "--port", str(port)],
            env={**os.environ, **LITELLM_ENVIRON},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        with suppress(httpx.TransportError):
            return httpx.get(f"{url}/health/liveliness", timeout=60.0).is_success
        return False

    try:
        await_that(answers, LITELLM_SECONDS)
        yield url
    finally:
        process.terminate()
        process.wait(LITELLM_SECONDS)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.every_release
def test_litellms_recipe_works_as_written(quick_start: Gateway, tmp_path: Path) -> None:
    file = tmp_path / "litellm.yaml"
    file.write_text(recipe("model_list:", quick_start).replace("llama-8b", "one"))
    say = [{"role": "user", "content": "memory follows"}]
    with (
        litellm(file) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as client,
        openai.OpenAI(base_url=f"{quick_start.url}/v1", api_key="none", timeout=600) as direct,
    ):
        texts = []
        for each in (client, direct):
            asked: Any = {"model": "one", "messages": say, "max_tokens": 8, "temperature": 0}
            answer = each.chat.completions.create(**asked)
            texts.append(answer.choices[0].message.content)
        assert texts[0] == texts[1]
        stream = client.chat.completions.create(**asked, stream=True)
        parts = [part.choices[0].delta.content or "" for part in stream if part.choices]
        assert "".join(parts) == texts[0]
