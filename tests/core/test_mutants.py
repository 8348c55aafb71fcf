"""The list of planted faults and what runs it: a stale entry is an error, and so is a lazy one."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from mutants import run
from mutants.run import KILLED, SURVIVED, Mutant, MutantError, Result, Warm, read_mutants

ROOT = Path(__file__).parents[2]
MUTANT = Mutant("m", "house.py", "roof = 1", "roof = 0", "It rains in.", ("test_house.py",))
TEST = "from house import roof\n\n\ndef test_roof() -> None:\n    assert roof {} 1\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "house.py").write_text("roof = 1\n")
    return tmp_path


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with pytest.MonkeyPatch.context() as patch, closing(Warm()) as made:
        patch.setitem(run.MODULES, "vllm", ())
        yield made


@pytest.mark.parametrize(("what", "outcome"), [("==", KILLED), ("<=", SURVIVED)])
def test_a_mutant_is_killed_by_a_test_that_sees_it(
    warm: Warm, tree: Path, what: str, outcome: str
) -> None:
    (tree / "test_house.py").write_text(TEST.format(what))
    (tree / "tests/mutants").mkdir(parents=True)
    (tree / "tests/mutants/no_shrinking.py").touch()
    assert warm.run_tests(tree, MUTANT.tests, 60) == SURVIVED
    MUTANT.plant(tree)
    assert warm.run_tests(tree, MUTANT.tests, 60) == outcome


@pytest.mark.parametrize("text", ["", "wall = 1\n", "roof = 1\nroof = 1\n"])
def test_a_text_that_is_not_there_once_is_an_error(tree: Path, text: str) -> None:
    (tree / "house.py").write_text(text)
    with pytest.raises(MutantError, match=r"m: its text is \d times in house.py, allowed is once"):
        MUTANT.plant(tree)
    assert (tree / "house.py").read_text() == text


def test_tests_that_are_not_there_show_nothing(warm: Warm, tree: Path) -> None:
    with pytest.raises(MutantError, match="could not be run"):
        warm.run_tests(tree, ["test_garden.py"], 60)


ENTRY = """
[[mutant]]
name = "m"
file = "house.py"
old = "a"
new = "b"
breaks = "It rains in."
"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (ENTRY, "name the tests that see it, or say why none can"),
        (ENTRY + 'tests = ["a"]\nequivalent = "so"\n', "name the tests"),
        (2 * (ENTRY + 'tests = ["a"]\n'), "two mutants have this name"),
        (
            ENTRY + 'tests = ["a"]\n' + ENTRY.replace('"m"', '"n"') + 'tests = ["b"]\n',
            "n: it plants the same as m",
        ),
    ],
)
def test_an_entry_is_there_once_and_says_who_sees_it_or_why_nobody_can(
    tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "list.toml").write_text(text)
    with pytest.raises(MutantError, match=reason):
        read_mutants([tmp_path / "list.toml"])


LISTED = read_mutants(sorted((ROOT / "tests/mutants").glob("*.toml")))


@pytest.mark.parametrize("mutant", LISTED, ids=lambda mutant: mutant.name)
def test_the_text_of_each_planted_fault_is_in_its_file_once(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert [test for test in mutant.tests if not (ROOT / test.partition("::")[0]).is_file()] == []


def test_what_was_found_of_a_mutant_stays_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.json")
    then, now = {"date": "then", "commit": "a"}, {"date": "now", "commit": "b"}
    known = replace(MUTANT, name="known")
    changed = replace(MUTANT, name="changed", new="roof = 2")
    gone = replace(MUTANT, name="gone")
    old = [MUTANT, known, replace(changed, new="roof = 3"), gone]
    run.write_results([Result(one.name, SURVIVED, 1.0) for one in old], old, then)
    run.write_results([Result(MUTANT.name, KILLED, 2.0)], [MUTANT, known, changed], now)
    found = json.loads(run.RESULTS.read_text())
    assert [(one["name"], one["outcome"], one["date"]) for one in found] == [
        ("m", KILLED, "now"),
        ("known", SURVIVED, "then"),
    ]
