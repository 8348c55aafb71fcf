"""Commands that other packages add: listed without an import, and no harm to others if broken."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import KVCACHED

Run = Callable[..., "subprocess.CompletedProcess[str]"]
GREETING = """
from pathlib import Path
import typer
from kvcached_core.cli.added import Added
from kvcached_core.errors import KVCachedError

Path(__file__).with_name("imported").touch()

def greet(name: str, loud: bool = False) -> None:
    "Greet somebody."
    if name == "nobody":
        raise KVCachedError("nobody is there")
    typer.echo(f"hello {name}" + "!" * loud)

def list_() -> None:
    typer.echo("not the core's")

number = 7

def instances(directory: Path) -> list[Added]:
    return [Added("Org/Llama", "llama")]
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs the command line beside a package that adds commands."""
    folder = tmp_path / "site"
    metadata = folder / "greeting-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "greeting.py").write_text(GREETING)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[kvcached.commands]\n"
        "greet = greeting:greet\n"
        "list = greeting:list_\n"
        "number = greeting:number\n"
        "gone = no_such_package.command:run\n"
        "renamed = greeting:no_such_function\n"
        "[kvcached.instances]\n"
        "names = greeting:instances\n"
    )

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        paths = (str(folder), os.environ.get("PYTHONPATH", ""))
        return subprocess.run(
            [KVCACHED, *words],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "KVCACHED_DIR": str(tmp_path / "kv"),
                "COLUMNS": "120",
            },
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_an_added_command_reads_its_own_arguments_and_has_its_own_help(run: Run) -> None:
    assert run("greet", "you", "--loud").stdout == "hello you!\n"
    told = run("greet", "--help").stdout
    assert "Greet somebody." in told
    assert "kvcached greet" in told
    assert run("greet").returncode == 2


def test_an_error_of_ours_in_an_added_command_is_a_message(run: Run) -> None:
    failed = run("greet", "nobody")
    assert (failed.returncode, failed.stderr) == (1, "kvcached: nobody is there\n")


def test_help_lists_added_commands_and_imports_none_of_them(run: Run, tmp_path: Path) -> None:
    told = run("--help")
    assert told.returncode == 0
    for name in ("greet", "number", "gone", "renamed"):
        assert f"`kvcached {name} --help` says more" in told.stdout
    assert not (tmp_path / "site" / "imported").exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gone", "no_such_package.command:run: ModuleNotFoundError: No module named"),
        ("renamed", "greeting:no_such_function: AttributeError: "),
        ("number", "greeting:number: TypeError: "),
    ],
)
def test_an_added_command_that_cannot_be_loaded_says_why_in_one_line(
    run: Run, name: str, why: str
) -> None:
    failed = run(name, "--help")
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (1, "", 1)
    assert failed.stderr.startswith(f"kvcached: the command {name!r} cannot be loaded from {why}")


def test_the_cores_commands_stay_its_own_beside_broken_ones(run: Run) -> None:
    listed = run("list")
    assert (listed.returncode, listed.stdout, listed.stderr) == (0, "", "no instance runs\n")


def test_a_command_that_nobody_adds_is_wrong_usage(run: Run) -> None:
    wrong = run("fly")
    assert wrong.returncode == 2
    assert "No such command 'fly'" in wrong.stderr


@pytest.mark.parametrize("words", [("sleep",), ("wake",), ("limit", "1GiB"), ("priority", "3")])
def test_a_name_that_another_package_gives_is_an_instances(
    run: Run, words: tuple[str, ...]
) -> None:
    verb, *rest = words
    failed = run(verb, "Org/Llama", *rest)
    assert failed.returncode == 1
    assert "no instance is named 'llama'" in failed.stderr
