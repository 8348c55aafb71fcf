"""The report, from records made by hand."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from multi_model import plots
from multi_model.alike import settings_of
from multi_model.client import Record, write_records
from multi_model.errors import ModeError
from multi_model.fleet import Samples
from multi_model.metrics import tpots, ttfts
from multi_model.modes import MODES, Site, again
from multi_model.report import write_report
from multi_model.wording import number

KEY = "ramp-P=2-2-models"
GIB = 2**30
NUM = 1200
# A letter of the page's font is narrower than this, and a cell has so much beside its text.
LETTER_PIXELS, CELL_PIXELS, PAGE_PIXELS = 8.0, 16.0, 940.0


def records(ttft_seconds: float, num: int = NUM) -> list[Record]:
    """Return requests of a minute whose times vary a little, and differ in each window."""
    return [
        Record(
            model=index % 2,
            due_seconds=60.0 * index / num,
            num_in=8,
            num_out=11,
            num_tokens=11,
            ttft_seconds=ttft_seconds * (1 + (index * 7 % 13) / 100),
            last_seconds=ttft_seconds * 1.2 + 0.1 * (1 + (index * 5 % 11) / 100),
        )
        for index in range(num)
    ]


def made(folder: Path, seconds: dict[str, float], bars: list[Any], num: int = NUM) -> Any:
    for mode, ttft_seconds in seconds.items():
        (folder / mode).mkdir()
        write_records(folder / mode / f"{KEY}.csv", records(ttft_seconds, num))
    samples = Samples(["m0", "m1"], [0.0, 1.0], [[GIB, 0], [GIB, GIB]], [3 * GIB, 3 * GIB])
    samples.write(folder / "elastic" / f"{KEY}-memory.csv")
    fact = {"num_requests": num, "num_models": 2, "name": "ramp P=2", "bars": bars}
    fact |= {"weights_bytes": [40 * GIB, 30 * GIB], "card_bytes": 72 * GIB}
    (folder / "run.json").write_text(json.dumps({KEY: fact, "pool_bytes": 4 * GIB}))
    write_report(folder)
    return json.loads((folder / "summary.json").read_text())


def with_turns(of: list[Record], slower: float) -> list[Record]:
    """Return records of which every other one is a later turn that takes so many times as long."""
    return [
        replace(each, turn=1, ttft_seconds=(each.ttft_seconds or 0) * slower)
        if number % 2
        else each
        for number, each in enumerate(of)
    ]


def bar(figure: str, relation: str, value: float) -> dict[str, Any]:
    words = {"workload": "ramp:2", "figure": figure, "other": "static"}
    return words | {"relation": relation, "value": value}


def own_bar(figure: str, relation: str, value: float) -> dict[str, Any]:
    return bar(figure, relation, value) | {"other": ""}


SECONDS = {"alone": 0.2, "static": 1.05, "elastic": 0.4}
BARS = [bar("mean_ttft", "<=", 0.5), bar("p99_ttft", "<=", 0.1)]
BARS += [own_bar("p99_ttft", "<=", 500.0), own_bar("mean_ttft", "<=", 400.0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the drawing, which takes most of a report's time."""
    for name in ("rates", "cdfs", "attainments", "memory", "curve"):
        monkeypatch.setattr(plots, name, lambda path, *_words: path.write_bytes(b""))


@pytest.fixture(scope="module")
def summary(folder: Path) -> Any:
    return made(folder, SECONDS | {again("static"): 1.05}, BARS)


@pytest.fixture(scope="module")
def page(folder: Path, summary: Any) -> str:
    assert summary
    return (folder / "report.html").read_text()


def compared(summary: Any, figure: str) -> Any:
    (line,) = (line for line in summary["workloads"][KEY]["compared"] if line["figure"] == figure)
    return line


def test_static_is_compared_with_elastic(summary: Any) -> None:
    ratios = summary["workloads"][KEY]["ratios"]
    assert ratios["static_to_elastic_mean_ttft"] == pytest.approx(2.625)
    assert [point["peak"] for point in summary["ramp"]] == [2.0]
    line = compared(summary, "mean_ttft")
    assert line["ratio"]["low"] <= line["ratio"]["value"] <= line["ratio"]["high"] < 0.5
    assert (line["said"], compared(summary, "attained")["said"]) == ("better", "better")


def test_a_bar_is_met_or_missed_by_the_whole_interval(summary: Any) -> None:
    assert compared(summary, "mean_ttft")["bar"]["said"] == "met"
    assert compared(summary, "p99_ttft")["bar"]["said"] == "missed"
    assert compared(summary, "mean_tpot")["bar"] is None


def test_a_figure_itself_may_have_a_bar(summary: Any, page: str) -> None:
    high, mean = summary["workloads"][KEY]["held_to_bars"]
    assert [high["bar"]["said"], mean["bar"]["said"]] == ["met", "missed"]
    assert high["interval"]["low"] <= high["value"] <= high["interval"]["high"] <= 500.0
    assert mean["value"] == pytest.approx(424, abs=1)
    assert compared(summary, "p99_ttft")["bar"]["said"] == "missed"  # that of the ratio
    assert "<td>&lt;= 500</td><td>met</td>" in page


def test_the_cards_of_a_split_are_told_from_weights_and_memory(summary: Any, page: str) -> None:
    assert summary["workloads"][KEY]["cards_of_static"] == {"elastic": 2}
    assert "an even split needs 2 such cards" in page


@pytest.mark.usefixtures("no_pictures")
def test_a_bar_of_a_figure_that_has_too_few_requests_is_not_met(tmp_path: Path) -> None:
    summary = made(tmp_path, SECONDS, [own_bar("p99_ttft", "<=", 1e6)], num=999)
    (line,) = summary["workloads"][KEY]["held_to_bars"]
    assert (line["value"], line["bar"]["said"]) == (None, "not told apart")


def test_the_same_mode_twice_is_the_control_of_every_figure(summary: Any) -> None:
    assert all(line["control"] for line in summary["workloads"][KEY]["compared"])
    assert compared(summary, "mean_ttft")["control"]["value"] == pytest.approx(1.0)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("second_run", "said"),
    [
        ({}, "better"),
        ({"elastic": 1.05}, "not told apart"),  # our second run was no better than theirs
        ({"elastic": 0.86}, "better"),  # it was better still
        ({"static": 0.95}, "not told apart"),
        ({"static": 1.15}, "better"),
        ({"elastic": 1.05, "static": 1.05}, "not told apart"),  # neither second run is left out
    ],
)
def test_ours_is_better_where_no_second_run_says_otherwise(
    tmp_path: Path, second_run: dict[str, float], said: str
) -> None:
    again_too = {again(mode): seconds for mode, seconds in second_run.items()}
    summary = made(tmp_path, SECONDS | {"elastic": 0.95} | again_too, [])
    assert compared(summary, "mean_ttft")["said"] == said


@pytest.mark.usefixtures("no_pictures")
def test_modes_that_are_alike_are_not_told_apart(tmp_path: Path) -> None:
    summary = made(tmp_path, SECONDS | {"elastic": 1.05}, [bar("mean_ttft", "<=", 1.0)])
    line = compared(summary, "mean_ttft")
    assert line["said"] == "not told apart"
    assert "No mode was run twice" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_fewer_than_a_thousand_requests_have_no_99th_percentile(tmp_path: Path) -> None:
    summary = made(tmp_path, SECONDS, [], num=999)
    assert "p99" not in summary["workloads"][KEY]["modes"]["static"]["ttft_ms"]
    assert compared(summary, "p99_ttft")["ratio"] is None
    assert "needs 1,000" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_a_schedule_of_few_windows_has_no_interval(tmp_path: Path) -> None:
    for mode in ("static", "elastic"):
        (tmp_path / mode).mkdir()
        short = [record for record in records(1.0) if record.due_seconds < 9.0]
        write_records(tmp_path / mode / f"{KEY}.csv", short)
    fact = {"num_requests": len(short), "num_models": 2, "name": "ramp P=2"}
    (tmp_path / "run.json").write_text(json.dumps({KEY: fact}))
    write_report(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert compared(summary, "mean_ttft")["ratio"] is None
    assert compared(summary, "mean_ttft")["said"] == "not told apart"


@pytest.mark.usefixtures("no_pictures")
def test_turns_that_come_back_are_compared_by_themselves(tmp_path: Path) -> None:
    for mode, slower in (("elastic", 3.0), ("offload", 1.5)):
        (tmp_path / mode).mkdir()
        write_records(tmp_path / mode / f"{KEY}.csv", with_turns(records(0.1, 2 * NUM), slower))
    fact = {"num_requests": 2 * NUM, "num_models": 2, "name": "ramp P=2"}
    (tmp_path / "run.json").write_text(json.dumps({KEY: fact}))
    write_report(tmp_path)
    lines = json.loads((tmp_path / "summary.json").read_text())["workloads"][KEY]["compared"]
    found = {line["figure"]: line["ratio"] for line in lines if line["ours"] == "offload"}
    assert found["mean_ttft_again"]["value"] == pytest.approx(0.5)
    assert found["p99_ttft_again"]["value"] == pytest.approx(0.5)
    assert 0.5 < found["mean_ttft"]["value"] < 0.7


@pytest.mark.usefixtures("no_pictures")
def test_a_time_says_how_many_requests_are_not_in_it(tmp_path: Path) -> None:
    made(tmp_path, SECONDS, [])
    lost = [
        replace(each, error="lost", ttft_seconds=None, last_seconds=None) if number < 7 else each
        for number, each in enumerate(records(0.4))
    ]
    write_records(tmp_path / "elastic" / f"{KEY}.csv", lost)
    write_report(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert compared(summary, "mean_ttft")["num_failed"] == [7, 0]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<td>424 ms, 7 failed</td><td>1,113 ms</td>") >= 2  # opening, and below
    assert "%, 7 failed" not in page  # they are misses there


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("shapes", "attained"), [([GIB, GIB, GIB], 1.0), ([GIB, 2 * GIB, GIB], None)]
)
def test_one_shapes_level_is_that_of_another_number_of_models(
    tmp_path: Path, shapes: list[int], attained: float | None
) -> None:
    more, fact = "ramp-P=2-3-models", {"num_requests": NUM, "name": "ramp P=2", "card_bytes": GIB}
    for mode, key, seconds in (("alone", KEY, 0.2), ("gateway", KEY, 0.3), ("static", more, 0.3)):
        (tmp_path / mode).mkdir()
        write_records(tmp_path / mode / f"{key}.csv", records(seconds))
    of_each = {
        KEY: fact | {"num_models": 2, "weights_bytes": shapes[:2]},
        more: fact | {"num_models": 3, "weights_bytes": shapes},
    }
    (tmp_path / "run.json").write_text(json.dumps(of_each))
    write_report(tmp_path)
    workloads = json.loads((tmp_path / "summary.json").read_text())["workloads"]
    assert workloads[KEY]["levels_of"] == KEY
    assert workloads[more]["levels_of"] == (KEY if attained else None)
    shares = workloads[more]["modes"]["static"].get("attainment")
    assert (shares and shares[1]) == attained
    said = "ramp P=2, 3 models: a model alone is that of ramp-P=2-2-models."
    assert (said in (tmp_path / "report.html").read_text()) is bool(attained)


def test_a_line_of_a_picture_ends_at_the_share_of_requests_that_were_answered() -> None:
    lost = [Record(0, 0.0, 8, 11, error="lost") for _ in range(NUM // 3)]
    single = replace(records(1.0)[0], num_tokens=1)
    found, shares = plots.steps([*records(1.0), *lost], ttfts)
    assert (len(found), shares[-1]) == (NUM, pytest.approx(0.75))
    assert found[0] == pytest.approx(1000.0)
    found, shares = plots.steps([*records(1.0), single], tpots)
    assert (len(found), shares[-1]) == (NUM, 1.0)
    assert [len(each) for each in plots.steps([], ttfts)] == [0, 0]


@pytest.mark.usefixtures("no_pictures")
def test_modes_that_were_asked_something_else_are_not_compared(tmp_path: Path) -> None:
    made(tmp_path, SECONDS, [])
    write_records(tmp_path / "alone" / f"{KEY}.csv", records(0.2, 100))  # which may be a part
    write_report(tmp_path)
    write_records(tmp_path / "elastic" / f"{KEY}.csv", records(0.2, NUM - 1))
    with pytest.raises(ModeError, match="static and elastic had different schedules"):
        write_report(tmp_path)


@pytest.mark.usefixtures("no_pictures")
def test_settings_that_differ_between_modes_are_said_first(tmp_path: Path) -> None:
    made(tmp_path, SECONDS, [])
    page = tmp_path / "report.html"
    assert "different settings" not in page.read_text()  # earlier records have none
    site = Site(is_host=False, kv_bytes_per_token=1, pool_bytes=8 * GIB)
    machine = {"gpu": "a card", "versions": {"vllm": "0.33.0"}}
    settings = settings_of(site, 600.0, machine, ["llama-8b"] * 3)
    for mode in ("alone", "static", "elastic"):
        (tmp_path / mode / f"{KEY}.json").write_text(json.dumps({"settings": settings}))
    write_report(tmp_path)
    assert "different settings" not in page.read_text()
    other = settings_of(replace(site, pool_bytes=4 * GIB), 600.0, machine, ["llama-8b"] * 3)
    (tmp_path / "static" / f"{KEY}.json").write_text(json.dumps({"settings": other}))
    write_report(tmp_path)
    said = "alone 8 GiB for all KV caches together, elastic 8 GiB for all KV caches together,"
    (found,) = json.loads((tmp_path / "summary.json").read_text())["workloads"][KEY]["unlike"]
    assert sorted(found.removeprefix("shared: ").split(", ")) == sorted(
        [*said.rstrip(",").split(", "), "static 4 GiB for all KV caches together"]
    )
    assert "modes had different settings" in page.read_text()


def test_without_turns_nothing_is_said_of_them(summary: Any) -> None:
    figures = {line["figure"] for line in summary["workloads"][KEY]["compared"]}
    assert "mean_ttft" in figures
    assert not {name for name in figures if name.endswith("_again")}


def test_the_most_models_are_told_for_each_scale(summary: Any) -> None:
    most = summary["models_at_99_percent"]
    assert (most["ramp P=2 within 5x"]["static"], most["ramp P=2 within 5x"]["elastic"]) == (0, 2)
    assert most["ramp P=2 within 20x"]["static"] == 2


def test_memory_is_told_from_its_samples(summary: Any) -> None:
    elastic = summary["workloads"][KEY]["modes"]["elastic"]
    assert (elastic["peak_bytes"], elastic["mean_bytes"]) == (2 * GIB, 1.5 * GIB)


def test_all_pictures_are_drawn_from_the_raw_records(page: str) -> None:
    for picture in ("rates", "latency", "attainment", "memory"):
        assert f'alt="{KEY}-{picture}"' in page


class Reader(HTMLParser):
    """What a reader sees first, and how wide each table has to be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.depth = 0  # of what is folded
        self.order: list[str] = []
        self.unfolded_images = 0
        self.tables: list[list[list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self.depth += tag == "details"
        self.unfolded_images += tag == "img" and not self.depth
        if tag in {"h1", "h2", "details"}:
            self.order.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag == "details"

    def handle_data(self, data: str) -> None:
        if self.order[-1:] == ["h2"] and data.strip() and "Summary" not in self.order:
            self.order.append(data.strip())
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data


def least_pixels(table: list[list[str]]) -> float:
    """Return how narrow a table can be: each column as its longest word."""
    columns = zip(*table, strict=True)
    words = [
        max(len(word) for cell in column for word in (cell.split() or [""])) for column in columns
    ]
    return sum(word * LETTER_PIXELS + CELL_PIXELS for word in words)


def test_the_report_opens_with_a_summary_and_folds_what_is_long(page: str) -> None:
    reader = Reader(page)
    assert reader.order[:3] == ["h1", "h2", "Summary"]
    assert page.count("<details>") >= 4
    assert "<details open" not in page
    assert reader.unfolded_images == 0


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("all_modes", [False, True])
def test_the_report_fits_a_thousand_pixels(
    page: str,
    tmp_path: Path,
    all_modes: bool,  # noqa: FBT001  pytest gives it
) -> None:
    if all_modes:
        made(tmp_path, dict.fromkeys([*MODES, again("static")], 123.4), BARS)
        page = (tmp_path / "report.html").read_text()
    reader = Reader(page)
    assert len(reader.tables) >= 4
    assert [table[0] for table in reader.tables if least_pixels(table) > PAGE_PIXELS] == []
    assert f"max-width: {PAGE_PIXELS:.0f}px" in page
    assert "img { max-width: 100% }" in page
    assert "nowrap" not in page


def test_numbers_are_written_out(page: str) -> None:
    text = re.sub(r'src="[^"]*"', "", page)
    assert "1,113 ms" in text  # 1.05 s, and 6 % on average
    assert not re.findall(r"\d[eE][+-]?\d", text)
    assert "0 requests failed" in text


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1180.2, "1,180 ms"),
        (118.02, "118 ms"),
        (33.71, "33.7 ms"),
        (8.574, "8.57 ms"),
        (0.0181, "0.018 ms"),
        (0.0, "0 ms"),
        (1234567.0, "1,234,567 ms"),
        (3, "3 ms"),
        (1200, "1,200 ms"),
        (None, ""),
    ],
)
def test_a_number_has_its_unit_and_no_exponent(value: float | None, said: str) -> None:
    assert number(value, "ms") == said
