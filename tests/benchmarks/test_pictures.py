"""The documents' pictures show what the records say, and the command under each draws it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from figures.document import ROOT
from figures.drawing import draw
from figures.picture import Line, Panel, Picture, read_pictures, said_digest

PICTURES = {picture.name: picture for picture in read_pictures()}
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
SECTIONS = [text for text in re.split(r"(?m)^## ", PAGE) if "![" in text]
README = (ROOT / "README.md").read_text()
SAID = ("**Draw:**", "**Measure:**", "**Hardware:**", "**It does not prove**")


def shown(text: str) -> list[str]:
    """Return the names of the drawn pictures in a text."""
    return [name for name in re.findall(r"images/([\w-]+)\.svg\)", text) if name in PICTURES]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_shows_what_its_records_say(name: str) -> None:
    assert said_digest(PICTURES[name].path) == PICTURES[name].digest, "python -m benchmarks draw"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda text: text.partition("\n")[0])
def test_a_section_shows_one_picture_and_says_what_a_reader_has_to_know(section: str) -> None:
    (name,) = shown(section)
    places = [section.index(word) for word in SAID]
    assert places == sorted(places)
    assert f"{SAID[0]} `python -m benchmarks draw {name}`" in section


def test_the_page_shows_each_picture_once_and_the_readme_two_of_them() -> None:
    assert sorted(shown(PAGE)) == sorted(PICTURES)
    assert len(PICTURES) == 5
    assert len(shown(README)) == 2


def test_a_picture_drawn_again_is_the_same_file(tmp_path: Path) -> None:
    picture = PICTURES["ramps"]
    for number in range(2):
        draw(picture, tmp_path / f"{number}.svg")
    first, second = ((tmp_path / f"{number}.svg").read_bytes() for number in range(2))
    assert first == second
    assert said_digest(tmp_path / "0.svg") == picture.digest


PICTURE = """
[[picture]]
name = "made"

[[picture.panel]]
rows = [{ label = "ours", mark = "us", value = "run.json > ours" }]
level = 1.0

[[picture.panel]]
lines = [{ label = "ours", at = [1, 2], values = ["run.json > ours", "run.json > ours > 0"] }]

[[picture.panel]]
areas = [{ label = "m0", at = "run.json > at", values = "run.json > ours" }]
"""


@pytest.fixture
def made(tmp_path: Path) -> Picture:
    (tmp_path / "run.json").write_text(json.dumps({"ours": [3, 1, 2], "at": [0, 1, 2]}))
    (tmp_path / "pictures.toml").write_text(PICTURE)
    (picture,) = read_pictures(tmp_path / "pictures.toml", tmp_path)
    return picture


def test_each_form_takes_its_values_from_the_record(made: Picture) -> None:
    rows, lines, areas = made.panels
    assert rows.values == (Line("ours", (), (2.0,), (1.0,), (3.0,), "us"),)
    assert lines.values == (Line("ours", (1.0, 2.0), (2.0, 3.0)),)
    assert areas.values == (Line("m0", (0.0, 1.0, 2.0), (3.0, 1.0, 2.0)),)


def test_another_value_is_another_digest(made: Picture, tmp_path: Path) -> None:
    draw(made, tmp_path / "made.svg")
    (tmp_path / "run.json").write_text(json.dumps({"ours": [3, 1, 2.1], "at": [0, 1, 2]}))
    from figures.value import read

    read.cache_clear()  # records do not change while a process looks at them
    (other,) = read_pictures(tmp_path / "pictures.toml", tmp_path)
    assert said_digest(tmp_path / "made.svg") == made.digest != other.digest


@pytest.mark.parametrize("field", ["title", "x", "form"])
def test_words_on_a_picture_count_too(made: Picture, field: str) -> None:
    first: Panel = made.panels[0]
    changed = replace(first, **{field: "other"})
    assert replace(made, panels=(changed, *made.panels[1:])).digest != made.digest


def test_a_file_of_another_kind_says_no_digest(tmp_path: Path) -> None:
    (tmp_path / "other.svg").write_text("<svg/>")
    assert not said_digest(tmp_path / "other.svg")
