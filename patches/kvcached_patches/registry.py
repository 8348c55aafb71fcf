"""Engine releases on the package index: which there are, and their Python files without the rest.

Of a wheel of hundreds of megabytes only the files that are asked for are read, and kept.
"""

import contextlib
import functools
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import requests
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from remotezip import RemoteZip, RemoteZipError

from kvcached_patches.locks import Lock, order
from kvcached_patches.sources import Sources, Wheel

INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvcached" / "engines"
PLATFORMS = ("x86_64.whl", "none-any.whl")
TIMEOUT_SECONDS = 60
# How long it is waited before the index is asked again that answered badly.
PAUSES_SECONDS = (1.0, 3.0, 9.0)
NAMES = "names.json"
BAD_ANSWERS = (requests.RequestException, RemoteZipError, zipfile.BadZipFile)
Found = TypeVar("Found")


@dataclass(frozen=True)
class Release:
    """One release of an engine on the index.

    Attributes:
        distribution: The package.
        version: Its version.
        file: The wheel's file name.
        url: Where it is.
    """

    distribution: str
    version: str
    file: str
    url: str


@functools.cache
def releases(distribution: str) -> dict[str, Release]:
    """Return a wheel of each release on the index, by version, the oldest first."""

    def list_files() -> list[dict[str, Any]]:
        answer = requests.get(
            f"{INDEX}/{distribution}/",
            headers={"Accept": "application/vnd.pypi.simple.v1+json"},
            timeout=TIMEOUT_SECONDS,
        )
        answer.raise_for_status()
        files: list[dict[str, Any]] = answer.json()["files"]
        return files

    found = {}
    for file in _ask(list_files):
        name, version = file["filename"], _version(file["filename"])
        if version and name.endswith(PLATFORMS) and not file.get("yanked"):
            found[version] = Release(distribution, version, name, file["url"])
    return {version: found[version] for version in sorted(found, key=order)}


def url_of(lock: Lock) -> str:
    """Return where a lock's wheel is on the index, if it is not kept here already."""
    if (CACHE / lock.wheel / NAMES).is_file():
        return ""
    return releases(lock.distribution)[lock.release].url


def whole_wheel(release: Release) -> Wheel:
    """Return a release's wheel, downloaded to a file that is gone when nobody has it open."""

    def download() -> Wheel:
        with tempfile.NamedTemporaryFile(suffix=".whl") as file:
            with requests.get(release.url, stream=True, timeout=TIMEOUT_SECONDS) as answer:
                answer.raise_for_status()
                for block in answer.iter_content(1 << 20):
                    file.write(block)
            file.flush()
            return Wheel(Path(file.name))

    return _ask(download)


class RemoteSources(Sources):
    """The files of a release on the index, each read when it is asked for, and kept.

    One thread may use it at a time: all files come by one connection.
    """

    def __init__(self, release: Release, cache: Path = CACHE) -> None:
        super().__init__()
        self._release = release
        self._folder = cache / release.file
        self._names: frozenset[str] | None = None
        self._wheel: RemoteZip | None = None

    def read(self, module: str) -> bytes | None:
        """See `Sources`."""
        base = module.replace(".", "/")
        names = (f"{base}.py", f"{base}/__init__.py")
        name = next((name for name in names if name in self._all_names()), None)
        if name is None:
            return None
        kept = self._folder / name
        if not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            _write(kept, self._from_wheel(lambda wheel: wheel.read(name)))
        return kept.read_bytes()

    def modules(self, package: str) -> Iterator[str]:
        """See `Sources`."""
        raise NotImplementedError(f"reading all of {package} needs the whole wheel")

    def _all_names(self) -> frozenset[str]:
        if self._names is None:
            kept = self._folder / NAMES
            if not kept.is_file():
                kept.parent.mkdir(parents=True, exist_ok=True)
                names = self._from_wheel(zipfile.ZipFile.namelist)
                files = [name for name in names if name.endswith(".py")]
                _write(kept, json.dumps(files).encode())
            self._names = frozenset(json.loads(kept.read_text()))
        return self._names

    def _from_wheel(self, read: Callable[[RemoteZip], Found]) -> Found:
        """Return what is read from the wheel, which is opened once unless the index answers badly.

        Its list of thousands of files comes and is read each time that it is opened.
        """
        release = self._release
        url = release.url or releases(release.distribution)[release.version].url

        def read_it() -> Found:
            wheel, self._wheel = self._wheel, None
            wheel = wheel or RemoteZip(url, session=requests.Session(), timeout=TIMEOUT_SECONDS)
            found = read(wheel)
            self._wheel = wheel
            return found

        return _ask(read_it)


def _ask(read: Callable[[], Found]) -> Found:
    """Return what is read from the index; it is asked again if it answers badly."""
    for pause_seconds in PAUSES_SECONDS:
        with contextlib.suppress(*BAD_ANSWERS):
            return read()
        time.sleep(pause_seconds)
    try:
        return read()
    except BAD_ANSWERS as error:
        raise SystemExit(f"the package index at {INDEX} cannot be read: {error}") from error


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _version(file: str) -> str | None:
    try:
        return str(parse_wheel_filename(file)[1])
    except InvalidWheelFilename:
        return None
