"""Every figure of the documents is what a record says, and a script is there for every record."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from catalog import BENCHMARKS, HOST
from figures.document import (
    DOCUMENTS,
    LAB,
    ROOT,
    Setting,
    numbers_without_a_record,
    read_settings,
    rewritten,
    wrong_figures,
)
from figures.sentence import HERE, Sentence, all_sentences, words_pattern
from figures.value import RESULTS, evaluate

RECORDS = tomllib.loads((HERE / "records.toml").read_text())["record"]
BENCHMARK_DOCUMENT = "\n".join(
    path.read_text() for path in [ROOT / "docs" / "benchmarks.md", *sorted(LAB.glob("*.md"))]
)
DATE = r"\d{4}-\d\d-\d\d"
SECTIONS = re.split(r"(?m)^#+ ", BENCHMARK_DOCUMENT)
TEXTS = {name: (ROOT / name).read_text() for name in DOCUMENTS}


def of_document(name: str) -> list[Sentence]:
    return [sentence for sentence in all_sentences() if sentence.document == name]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_figure_is_what_its_record_says(name: str) -> None:
    wrong = wrong_figures(TEXTS[name], of_document(name))
    assert [(sentence.rendered(), other) for sentence, other in wrong] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_number_is_a_records_or_a_setting_with_a_reason(name: str) -> None:
    assert numbers_without_a_record(TEXTS[name], of_document(name), read_settings()) == []


def test_every_sentence_is_of_a_document_that_is_checked() -> None:
    assert {sentence.document for sentence in all_sentences()} <= set(DOCUMENTS)


def test_every_setting_is_in_use() -> None:
    texts = "\n".join(TEXTS.values())
    listed = [words for setting in read_settings() for words in setting.texts]
    assert [words for words in listed if not re.search(words_pattern(words), texts)] == []


def test_every_record_is_listed_once_and_is_there() -> None:
    files = {path.relative_to(RESULTS) for path in RESULTS.rglob("*") if path.is_file()}
    for record in RECORDS:
        own = {file for file in files if file.is_relative_to(record["path"])}
        assert own, record
        files -= own
    assert not files, f"list them in {HERE / 'records.toml'}, or remove them: {sorted(files)}"


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: str(record["path"]))
def test_a_section_names_the_record_and_every_word_of_the_command_that_makes_it(
    record: dict[str, str],
) -> None:
    script, *words = shlex.split(record["command"].removeprefix("python -m benchmarks run "))
    assert script in BENCHMARK_DOCUMENT
    assert any(all(w in text for w in (record["path"], *words)) for text in SECTIONS)


def dates_of(record: dict[str, str]) -> set[str]:
    path = RESULTS / record["path"]
    path = path / "summary.json" if path.is_dir() else path
    said = json.loads(path.read_text()) if path.suffix == ".json" else {}
    return set(re.findall(DATE, json.dumps([said.get("machine"), said.get("date")])))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition("\n")[0])
def test_the_dates_of_a_section_are_those_of_its_records(section: str) -> None:
    records = [record for record in RECORDS if f"`{record['path']}" in section]
    known = {date for record in records for date in dates_of(record)}
    assert set(re.findall(DATE, section)) <= known or not records


def test_a_host_benchmark_writes_where_its_record_lies() -> None:
    listed = {record["path"] for record in RECORDS}
    assert {item.result_name for item in BENCHMARKS if item.where == HOST} <= listed


@pytest.mark.parametrize("command", sorted({record["command"] for record in RECORDS}))
def test_the_command_that_makes_a_record_is_committed(command: str) -> None:
    script, *words = shlex.split(command)
    if script == "make":
        assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text()
    elif script == "python":
        assert words[3] in {benchmark.name for benchmark in BENCHMARKS}
    else:
        assert (ROOT / script).is_file()
    sources = "".join(path.read_text() for path in (ROOT / "benchmarks").rglob("*.py"))
    # A word with a space in it is what an option hands on.
    options = [word for word in words if re.fullmatch(r"--\S+", word)]
    assert [option for option in options if f'"{option}"' not in sources] == []


def rows_with_a_bar(section: str) -> list[dict[str, str]]:
    """Return the rows of a section's tables whose bar is one number, by the names of columns."""
    rows: list[dict[str, str]] = []
    names: list[str] = []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            names = []
        elif not names:
            names = cells
        elif re.fullmatch(r"[\d.]+", dict(zip(names, cells, strict=False)).get("bar", "")):
            rows.append(dict(zip(names, cells, strict=False)))
    return rows


def misses(row: dict[str, str]) -> bool:
    """Return whether a ratio misses its bar: rates have bars of 1 at most, times of more."""
    ratio, bar = float(row.get("ratio") or row["elastic / static"]), float(row["bar"])
    return ratio < bar if bar <= 1 else ratio > bar


WITH_A_BAR = [s for s in SECTIONS if re.search(r"\| (ratio|elastic / static) \|.* bar \|", s)]


@pytest.mark.parametrize("section", WITH_A_BAR, ids=lambda section: section.partition("\n")[0])
def test_a_section_with_a_ratio_beyond_its_bar_says_so(section: str) -> None:
    missed = [row for row in rows_with_a_bar(section) if misses(row)]
    assert rows_with_a_bar(section)
    assert bool(missed) == ("missed" in section), missed


# How the check itself works, on a record and a document made by hand.

SENTENCE = Sentence(
    document="page.md",
    section="Speed",
    text="| ours | {ratio:.2f} | {ratio.min:.2f} to {ratio.max:.2f} |",
    values={"ratio": "run.json > rounds > * > ours | per run.json > rounds > * > theirs"},
)
PAGE = """# Page

## Speed

| what | ratio | range | bar |
|---|---|---|---|
| ours | 0.50 | 0.25 to 2.00 | 0.9 |

With 8 cores.
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rounds = [
        {"name": "a", "ours": 1, "theirs": 2, "seconds": 0.5},
        {"name": "b", "ours": 1, "theirs": 4},
        {"name": "c", "ours": 4, "theirs": 2},
    ]
    record = {"rounds": rounds, "said": "failed: 138 pages", "counts": [3, 5]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "memory.csv").write_text("seconds,m0,name\n0.5,1024,x\n1.0,4096,y\n")
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ("run.json > rounds > 1 > theirs", (4.0,)),
        ("run.json > rounds > * > ours | sum", (6.0,)),
        ("run.json > counts | max", (5.0,)),
        ("run.json > rounds > [seconds] > seconds | ms", (500.0,)),
        ("run.json > rounds > [name=b] > theirs | inverse", (0.25,)),
        ("run.json > rounds > [ours=1 and theirs=2] > seconds", (0.5,)),
        ("run.json > rounds > * > ours | count", (3.0,)),
        ("run.json > rounds > 0 > theirs | less run.json > rounds > 0 > ours", (1.0,)),
        ("run.json > rounds > * > ours | same run.json > rounds > 0 > ours", (1.0, 1.0, 0.0)),
        ("run.json > said | number", (138.0,)),
        ("memory.csv > * > m0 | max", (4096.0,)),
    ],
)
def test_a_value_is_what_its_path_and_words_say(
    results: Path, spec: str, values: tuple[float, ...]
) -> None:
    assert evaluate(spec, results).values == values


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("run.json > round", "rounds"),
        ("run.json > counts > 7", "2 items"),
        ("run.json > counts | average", "not one of count, max"),
        ("run.log > counts", "neither .json nor .csv"),
    ],
)
def test_a_wrong_path_or_word_is_named_with_what_there_is(
    results: Path, spec: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(spec, results)


def test_a_right_page_has_nothing_wrong(results: Path) -> None:
    eight = Setting(texts=["8 cores"], reason="the machine's size")
    assert wrong_figures(PAGE, [SENTENCE], results) == []
    assert numbers_without_a_record(PAGE, [SENTENCE], [eight], results) == []


@pytest.mark.parametrize(("right", "wrong"), [("0.50", "0.51"), ("2.00", "1.90")])
def test_a_changed_digit_is_found_and_mended(results: Path, right: str, wrong: str) -> None:
    page = PAGE.replace(right, wrong)
    ((_, said),) = wrong_figures(page, [SENTENCE], results)
    assert wrong in said
    assert rewritten(page, [SENTENCE], results) == PAGE


def test_a_figure_in_another_section_does_not_count(results: Path) -> None:
    page = PAGE.replace("## Speed", "## Speed\n\nNothing yet.\n\n## More")
    assert wrong_figures(page, [SENTENCE], results) == [(SENTENCE, "nothing like it")]


def test_a_section_that_is_not_there_is_named(results: Path) -> None:
    with pytest.raises(ValueError, match="'Speed'"):
        wrong_figures("# Page", [SENTENCE], results)


@pytest.mark.parametrize(
    "words",
    ["1.7 times.", "Took 12 ms.", "| theirs | 0.70 |", "1.5 GiB", "a 99 % share", "5 and `6`"],
)
def test_a_number_that_no_record_says_is_found(results: Path, words: str) -> None:
    page = PAGE.replace("With 8 cores.", words)
    (found,) = numbers_without_a_record(page, [SENTENCE], [], results)
    assert "line 9" in found


@pytest.mark.parametrize(
    "words",
    ["vLLM 0.26.0 on an H200", "on 2026-11-26", "`--kv-gib 6`", "p99 of 512/128", "an 8B model"],
)
def test_names_and_dates_are_no_figures(results: Path, words: str) -> None:
    page = PAGE.replace("With 8 cores.", words)
    assert numbers_without_a_record(page, [SENTENCE], [], results) == []


def test_a_listing_or_a_setting_at_the_start_of_a_line_hides_nothing_behind_it(
    results: Path,
) -> None:
    listing = "    run --seconds 7\n        --more 9\n\nIt took 12 ms.\n8 cores\nfor 5 days."
    page = PAGE.replace("With 8 cores.", listing)
    eight = Setting(texts=["8 cores"], reason="the machine's size")
    found = numbers_without_a_record(page, [SENTENCE], [eight], results)
    assert [number.split("'")[1] for number in found] == ["12", "5"]


def test_a_column_whose_head_begins_with_bar_needs_no_record(results: Path) -> None:
    page = PAGE.replace("range | bar", "range | bar for all")
    assert "| 0.9 |" in page
    eight = Setting(texts=["8 cores"], reason="the machine's size")
    assert numbers_without_a_record(page, [SENTENCE], [eight], results) == []


def test_a_setting_covers_its_own_words_only(results: Path) -> None:
    page = PAGE.replace("With 8 cores.", "With 18 cores, 8 cores and 1.8 cores.")
    eight = Setting(texts=["8 cores"], reason="the machine's size")
    found = numbers_without_a_record(page, [SENTENCE], [eight], results)
    assert [number.split("'")[1] for number in found] == ["18", "1.8"]
