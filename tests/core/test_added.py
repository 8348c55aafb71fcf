"""What other packages say of instances: names that commands take, and columns of `top`."""

import io
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from core.test_top import DEVICES, LONG_NAME
from rich.console import Console

from kvcached_core.cli import added as module
from kvcached_core.cli.added import Added, added, instance_named
from kvcached_core.cli.picture import Picture

HERE = Added("org/qwen", "qwen", {"state": "busy", "queue": "12"}, "busy")
ABSENT = (Added("org/a", "org-a", {"state": "cold"}, "cold"), Added("b", "b", {}, "failed"))


def working(directory: Path) -> list[Added]:
    return [Added("org/qwen", "qwen", {"state": directory.name})]


def failing(directory: Path) -> list[Added]:
    raise OSError(directory)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    values = {"a": "failing", "b": "gone", "c": "working"}
    entries = [
        EntryPoint(name, f"{__name__}:{value}", module.GROUP) for name, value in values.items()
    ]
    monkeypatch.setattr(module, "entry_points", lambda **_: entries)
    module._functions.cache_clear()
    yield
    module._functions.cache_clear()


def drawn(width: int, height: int | None, *said: Added) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    options = console.options.update(width=width, height=height)
    lines = console.render_lines(Picture(DEVICES, said=said), options, pad=False)
    return "\n".join("".join(segment.text for segment in line).rstrip() for line in lines)


@pytest.mark.usefixtures("packages")
def test_a_package_that_fails_hides_no_other(tmp_path: Path) -> None:
    assert [each.cells for each in added(tmp_path)] == [{"state": tmp_path.name}]


@pytest.mark.usefixtures("packages")
def test_a_name_that_a_package_gives_is_the_instances(tmp_path: Path) -> None:
    assert instance_named("org/qwen", tmp_path) == "qwen"
    assert instance_named("qwen", tmp_path) == "qwen"
    assert instance_named("other", tmp_path) == "other"


def test_what_is_said_of_an_instance_is_in_columns_of_its_own() -> None:
    header, *lines = drawn(100, None, HERE).splitlines()
    at = header.index("state")
    assert header[at:].split()[:2] == ["state", "queue"]
    (line,) = [line for line in lines if line.startswith("qwen")]
    assert line[at - 3 :].split()[:2] == ["busy", "12"]
    (other,) = [line for line in lines if line.startswith(LONG_NAME[:6]) and "-2" in line]
    assert "busy" not in other


def test_columns_of_others_leave_room_for_what_is_resident() -> None:
    header = drawn(60, None, HERE).splitlines()[0]
    assert {"resident", "used", "state", "queue"} <= set(header.split())


def test_without_anybody_who_says_something_the_picture_is_as_before() -> None:
    absent = Added("org/qwen", "no-such-instance", {"state": "busy"}, "cold")
    assert drawn(100, None, absent).replace("cold: org/qwen\n", "") == drawn(100, None)


def test_instances_that_are_not_there_are_named_in_one_line() -> None:
    assert drawn(100, None, *ABSENT).splitlines()[-2] == "cold: org/a; failed: b"


@pytest.mark.parametrize("height", range(6, 20))
def test_a_low_terminal_is_never_overfull(height: int) -> None:
    assert len(drawn(80, height, HERE, *ABSENT).splitlines()) <= height


def test_where_no_instance_runs_those_that_could_are_named() -> None:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(Picture([], said=ABSENT))
    output = console.file
    assert isinstance(output, io.StringIO)
    assert output.getvalue() == "no instance runs\ncold: org/a; failed: b\n"
