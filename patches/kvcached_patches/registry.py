"""Engine releases on the package index: which there are, and their Python files without the rest.

Of a wheel of hundreds of megabytes only the files that are asked for are read, and kept.
"""

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import requests
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from remotezip import RemoteZip, RemoteZipError
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from kvcached_patches.locks import Lock, order
from kvcached_patches.sources import Sources, Wheel

INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvcached" / "engines"
PLATFORMS = ("x86_64.whl", "none-any.whl")
TIMEOUT_SECONDS = 60
AGAIN = Retry(total=4, backoff_factor=1.0, status_forcelist=(500, 502, 503, 504))
NAMES = "names.json"


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
    with _index():
        answer = requests.get(
            f"{INDEX}/{distribution}/",
            headers={"Accept": "application/vnd.pypi.simple.v1+json"},
            timeout=TIMEOUT_SECONDS,
        )
        answer.raise_for_status()
    found = {}
    for file in answer.json()["files"]:
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
    with tempfile.NamedTemporaryFile(suffix=".whl") as file:
        with _index(), requests.get(release.url, stream=True, timeout=TIMEOUT_SECONDS) as answer:
            answer.raise_for_status()
            for block in answer.iter_content(1 << 20):
                file.write(block)
        file.flush()
        return Wheel(Path(file.name))


class RemoteSources(Sources):
    """The files of a release on the index, each read when it is asked for, and kept.

    One thread may use it at a time: all files come by one connection.
    """

    def __init__(self, release: Release, cache: Path = CACHE) -> None:
        super().__init__()
        self._release = release
        self._folder = cache / release.file
        self._names: frozenset[str] | None = None

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
            with _index():
                _write(kept, self._wheel.read(name))
        return kept.read_bytes()

    def modules(self, package: str) -> Iterator[str]:
        """See `Sources`."""
        raise NotImplementedError(f"reading all of {package} needs the whole wheel")

    def _all_names(self) -> frozenset[str]:
        if self._names is None:
            kept = self._folder / NAMES
            if not kept.is_file():
                kept.parent.mkdir(parents=True, exist_ok=True)
                with _index():
                    names = [name for name in self._wheel.namelist() if name.endswith(".py")]
                _write(kept, json.dumps(names).encode())
            self._names = frozenset(json.loads(kept.read_text()))
        return self._names

    @functools.cached_property
    def _wheel(self) -> RemoteZip:
        """The wheel, opened once: its list of thousands of files comes and is read each time."""
        url = self._release.url or releases(self._release.distribution)[self._release.version].url
        session = requests.Session()
        session.mount("https://", HTTPAdapter(max_retries=AGAIN))
        return RemoteZip(url, session=session, timeout=TIMEOUT_SECONDS)


@contextlib.contextmanager
def _index() -> Iterator[None]:
    try:
        yield
    except (requests.RequestException, RemoteZipError) as error:
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
