"""The list of benchmarks and the command that runs them."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from catalog import BENCHMARKS, Benchmark
from helpers.commands import said_to_a_full_disk, said_to_nobody
from multi_model.options import lengths_of, parser
from multi_model.settings import make_workload

ROOT = Path(__file__).parents[2]
# They would begin the tests' program anew, in virtual time; tests of their own run them.
BEGIN_ANEW = {"equal_schedulers.py", "ramp_schedulers.py"}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_script_is_in_the_list_and_is_there() -> None:
    folder = ROOT / "benchmarks"
    scripts = {benchmark.script for benchmark in BENCHMARKS}
    assert all((folder / script).exists() for script in scripts)
    runnable = {path.name for path in folder.glob("*.py") if "\ndef main()" in path.read_text()}
    assert runnable - {"__main__.py"} == {script for script in scripts if "/" not in script}


@pytest.mark.parametrize("script", sorted({each.script for each in BENCHMARKS} - BEGIN_ANEW))
def test_a_benchmark_says_how_it_is_called(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert all(each.output in said for each in BENCHMARKS if each.script == script)


@pytest.mark.parametrize(
    "benchmark",
    [each for each in BENCHMARKS if each.script == "multi_model/run.py"],
    ids=lambda each: each.name,
)
def test_a_multi_model_benchmarks_arguments_are_understood(benchmark: Benchmark) -> None:
    options = parser("").parse_args([*benchmark.arguments, benchmark.output, "folder"])
    lengths = lengths_of(options)
    for words in options.workloads or []:
        for num_models in options.num_models or [3]:
            assert make_workload(words, num_models, lengths, options.seconds).requests


def imported_of_tests() -> Iterator[tuple[str, str]]:
    """Yield module and name of what benchmarks import of the tests' helpers, also in functions."""
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helpers."):
                yield from ((str(node.module), alias.name) for alias in node.names)


def test_what_benchmarks_import_of_the_tests_is_there() -> None:
    found = set(imported_of_tests())
    assert found
    for module, name in sorted(found):
        text = (ROOT / "tests" / f"{module.replace('.', '/')}.py").read_text()
        known = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        known |= {
            node.name
            for node in ast.parse(text).body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }
        assert name in known, f"{module} has no {name}"


def test_list_names_all() -> None:
    listed = run("list").stdout
    assert all(benchmark.name in listed for benchmark in BENCHMARKS)


def test_a_list_that_cannot_be_written_is_told_in_one_line_and_its_reader_may_leave() -> None:
    command = (sys.executable, "-m", "benchmarks", "list")
    assert said_to_a_full_disk(*command) == (
        1,
        "benchmarks: what it prints cannot be written: No space left on device\n",
    )
    assert said_to_nobody(*command) == (1, "")


def test_figures_ends_well_where_the_documents_say_what_the_records_say() -> None:
    done = run("figures")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [["run", "nothing"], ["report", "/nowhere"], ["draw", "nothing"]])
def test_what_is_not_there_is_named(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode
    assert words[1] in done.stderr
