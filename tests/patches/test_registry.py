"""Files of a release on the index are read once; an index that cannot be read is said plainly."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
from remotezip import RemoteIOError

from kvcached_patches import registry
from kvcached_patches.registry import Release, RemoteSources, releases

RELEASE = Release("engine", "1.0.0", "engine-1.0.0-py3-none-any.whl", "https://index/engine.whl")


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
