"""Files of a release on the index are read once; an index that cannot be read is said plainly."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import requests
from remotezip import RemoteIOError

from kvcached_patches import registry
from kvcached_patches.registry import Release, RemoteSources, releases

RELEASE = Release("engine", "1.0.0", "engine-1.0.0-py3-none-any.whl", "https://index/engine.whl")


NUM_PAUSES = 2


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PAUSES_SECONDS", (0.0,) * NUM_PAUSES)


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A wheel on a pretended index; the list says how often it was opened."""
    opened: list[str] = []
    wheel = tmp_path / "engine.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("engine/__init__.py", "top = 1\n")
        made.writestr("engine/core.py", "core = 1\n")
        made.writestr("engine/kernel.so", "not Python")

    def open_it(url: str, **_: Any) -> zipfile.ZipFile:
        opened.append(url)
        return zipfile.ZipFile(wheel)

    monkeypatch.setattr(registry, "RemoteZip", open_it)
    return opened


def test_a_file_is_read_once_and_kept(opened: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    sources = RemoteSources(RELEASE, cache)
    assert sources.read("engine.core") == b"core = 1\n"
    assert sources.read("engine") == b"top = 1\n"
    assert sources.read("engine.gone") is None
    assert opened == [RELEASE.url]  # once for the names and two files
    again = RemoteSources(RELEASE, cache)
    assert again.read("engine.core") == b"core = 1\n"
    assert len(opened) == 1
    assert not list(cache.rglob("*.so"))


@pytest.mark.parametrize("problem", [RemoteIOError("reset"), zipfile.BadZipFile("cut off")])
def test_a_wheel_is_asked_for_again_where_the_index_answers_badly(
    opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    problems = [problem] * NUM_PAUSES
    read = zipfile.ZipFile.read

    def read_it(self: zipfile.ZipFile, name: str) -> bytes:
        if problems:
            raise problems.pop()
        return read(self, name)

    monkeypatch.setattr(zipfile.ZipFile, "read", read_it)
    assert RemoteSources(RELEASE, tmp_path / "cache").read("engine.core") == b"core = 1\n"
    assert len(opened) == 1 + NUM_PAUSES  # a connection that answered badly is of no more use


def test_a_list_of_releases_is_asked_for_again_where_it_is_no_json(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = {"filename": "engine-1.0.0-py3-none-any.whl", "url": "https://index/engine.whl"}
    answers = [b"<html>", json.dumps({"files": [file]}).encode()]

    def get(_url: str, **_: Any) -> requests.Response:
        answer = requests.Response()
        answer.status_code, answer._content = 200, answers.pop(0)
        return answer

    monkeypatch.setattr(requests, "get", get)
    assert releases("engine-once-bad") == {
        "1.0.0": Release("engine-once-bad", "1.0.0", file["filename"], file["url"])
    }
    assert not answers


def test_a_wheel_that_cannot_be_read_is_the_indexs_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_it(url: str, **_: Any) -> zipfile.ZipFile:
        raise RemoteIOError(f"{url} was reset")

    monkeypatch.setattr(registry, "RemoteZip", open_it)
    with pytest.raises(SystemExit, match=r"cannot be read: https://index/engine\.whl was reset"):
        RemoteSources(RELEASE, tmp_path).read("engine.core")


def test_an_index_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "INDEX", "http://127.0.0.1:9/simple")
    with pytest.raises(SystemExit, match=r"the package index at http://127\.0\.0\.1:9/simple"):
        releases("engine")
