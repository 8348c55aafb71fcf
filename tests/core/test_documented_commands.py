"""Every command that a document shows runs as it is written there, or a reason says why not."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.documents import DOCUMENTS, ROOT, blocks, commands

from kvcached_core.config import Enable, read_config, read_switch
from kvcached_core.ledger.bell import Doorbell
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import doorbell_path, ledger_directory
from kvcached_core.ledger.weights import WeightsWish
from kvcached_core.units import GIB, MIB

PAGE = 16 * MIB
POOL_BYTES = 64 * GIB  # no memory stands behind it: the ledger only counts
# Commands that other tests run, by how they begin.
ELSEWHERE = {
    "ENABLE_KVCACHED=1 vllm serve ": "tests/vllm/test_vllm_documented_commands.py",
    "vllm serve ": "tests/vllm/test_vllm_documented_commands.py",
    "python -m sglang.launch_server ": "tests/sglang/test_sglang_documented_commands.py",
    "kvcached serve ": "tests/demo/test_ways.py",
    "kvcached run ": "tests/core/program/test_run.py",
    "key=": "tests/gateway/test_gateway_docs.py",
    "printf ": "tests/gateway/test_gateway_docs.py",
    "RAY_worker_niceness=0 ray start ": "tests/helpers/ray_nodes.py",
    "serve run ": "tests/helpers/ray_nodes.py",
    "kvcached models --dir /dev/shm/kvcached-0/cluster": "tests/ray/test_ray_steered.py",
}
NOT_RUN = {
    "pip install .": "every environment of the tests is made by it: examples/cpu_engine/install.sh",
    "pip install 'kvcached-elastic[gateway]'": "the same, with the extra",
    "serve deploy examples/ray/serve.yaml": "examples/ray/README.md says that it was not run",
    "pip uninstall kvcached-elastic": "it would end the tests; test_readme.py checks the name",
    "pressure = used / (used + what it could still use)        1 while it waits for memory": (
        "a formula"
    ),
}
# What is added where a command would not end.
ADDED = {
    "kvcached metrics": " --once",
    "kvcached metrics --port 9410": " --once",
}
PYTHON = [block for name in DOCUMENTS for block in blocks(ROOT / name) if "import" in block[0]]
IN_PYTHON = {line for block in PYTHON for line in block}
OF_CLIENTS = "from openai import OpenAI"  # tests/demo/test_ways.py runs it in front of a gateway


def beginning_with(word: str) -> list[str]:
    return [command for command in commands() if command.startswith(f"{word} ")]


def ours() -> list[str]:
    """Our commands that need neither a gateway, nor a cluster, nor a program."""
    others = ("serve", "/cluster", "kvcached run ")
    lines = beginning_with("kvcached")
    return [line for line in lines if not any(words in line for words in others)]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """The folder of a ledger with one instance, `llama`, that gives what it is asked for."""
    folder = ledger_directory(tmp_path / "kv")
    with Ledger(folder / "host.ledger", POOL_BYTES) as ledger:
        row = ledger.register(name="llama", engine="vllm 0.32.0", page_bytes=PAGE)
        ledger.promise(row, 8 * PAGE, PAGE)
        ledger.settle(row, mapped_bytes=8 * PAGE, used_bytes=PAGE, cached_bytes=6 * PAGE)
        ledger.describe_weights(row, GIB)

        def give() -> None:
            given = ledger.wanted(row).asked_bytes
            ledger.settle(row, unmapped_bytes=given, used_bytes=PAGE, cached_bytes=0)
            ledger.acknowledge(row)
            if ledger.weights_wish(row) is WeightsWish.WAKE:
                ledger.settle_weights(row, mapped_bytes=GIB)

        bell = Doorbell(doorbell_path(ledger.path, row), give)
        yield folder
        bell.close()


def run(command: str, home: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run a line in a shell that finds our commands and this home."""
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if "KVCACHED" not in name}
    return subprocess.run(
        ["bash", "-c", f"{command}\nexit $?"],
        cwd=ROOT,
        env=kept | {"PATH": paths, "HOME": str(home)} | environ,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_command_is_run_somewhere_or_has_a_reason() -> None:
    here = {*ours(), *beginning_with("make"), *beginning_with("export")}
    for command in commands():
        elsewhere = [file for start, file in ELSEWHERE.items() if command.startswith(start)]
        ways = [command in here, command in NOT_RUN, command in IN_PYTHON, *map(bool, elsewhere)]
        assert sum(ways) == 1, command
        assert all((ROOT / file).exists() for file in elsewhere)


def test_every_reason_is_for_a_command_that_is_still_there() -> None:
    assert {*NOT_RUN, *ADDED} <= set(commands())


@pytest.mark.parametrize("command", ours())
def test_a_documented_command_of_ours_does_what_it_says(
    directory: Path, tmp_path: Path, command: str
) -> None:
    done = run(command + ADDED.get(command, ""), tmp_path, KVCACHED_DIR=str(directory))
    assert done.returncode == 0, done.stdout + done.stderr
    if command not in ("kvcached doctor", "kvcached --install-completion"):
        assert "llama" in done.stdout


@pytest.mark.parametrize("command", beginning_with("make"))
def test_a_documented_target_is_one_that_make_knows(tmp_path: Path, command: str) -> None:
    done = run(f"{command} --dry-run", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", beginning_with("export"))
def test_documented_variables_are_settings(command: str) -> None:
    variables = dict(word.split("=") for word in command.split()[1:])
    assert read_switch(variables) is Enable.ON
    read_config(variables)


@pytest.mark.parametrize(
    "block", [one for one in PYTHON if one[0] != OF_CLIENTS], ids=lambda block: block[0]
)
def test_documented_python_runs(directory: Path, block: list[str]) -> None:
    code = "\n".join(block)
    written = re.findall(r"/dev/shm/[\w-]+", code)  # noqa: S108  no file is made there
    assert len(written) == 1
    values: dict[str, object] = {}
    exec(code.replace(written[0], str(directory)), values)  # noqa: S102  the document's own lines
    assert "applied" in str(values["answer"])
