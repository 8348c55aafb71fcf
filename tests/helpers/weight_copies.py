"""Engines that start with host copies of their weights, as fixtures: import them by name."""

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest

from helpers.weight_pages import PagedLayout, Pages, Pins, bytes_at
from kvcached_core.config import Config
from kvcached_core.units import GIB
from kvcached_core.weights.budgets import make_budget
from kvcached_core.weights.copies_folder import read_holders
from kvcached_core.weights.host_copy import HostCopy, complete
from kvcached_core.weights.key import CopyKey
from kvcached_core.weights.open_copy import open_copy

KEY = CopyKey("0" * 32, "llama")
OTHER_KEY = CopyKey("1" * 32, "qwen")
LAYOUT = PagedLayout()
WHOLE_BYTES = LAYOUT.num_pages * LAYOUT.page_bytes

Start = Callable[..., HostCopy]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(weights_dir=tmp_path / "weights", host_budget=8 * WHOLE_BYTES)


@pytest.fixture
def image(config: Config) -> Path:
    return config.copies_dir / f"{KEY.digest}.image"


@pytest.fixture
def opened(config: Config) -> Iterator[Callable[..., HostCopy | None]]:
    """Return what opens copies; they are closed after the test."""
    copies = []

    def open_one(key: CopyKey = KEY, *, stop: Event | None = None) -> HostCopy | None:
        copy = open_copy(config, key, LAYOUT, make_budget(config, GIB), stop=stop)
        if copy is not None:
            copies.append(copy)
        return copy

    yield open_one
    for copy in copies:
        copy.close()


@pytest.fixture
def start(opened: Callable[..., HostCopy | None]) -> Start:
    """Return what opens a copy for some pages and completes it; what it holds is checked."""

    def begin(pages: Pages, key: CopyKey = KEY) -> HostCopy:
        copy = opened(key)
        assert copy is not None
        assert complete(copy, Pins(), pages, Event())
        check(copy, pages)
        return copy

    return begin


def check(copy: HostCopy, pages: Pages) -> None:
    """See that a copy has these pages, and says so."""
    assert contents(copy) == pages.content
    assert copy.sums == pages.sums(0, LAYOUT.num_pages)
    assert copy.is_complete


def contents(copy: HostCopy) -> list[bytes]:
    """Return every page of a copy."""
    return [bytes_at(copy.page_address(page)) for page in range(LAYOUT.num_pages)]


def held_bytes(config: Config) -> int:
    """Return what host memory of ours is held for."""
    return sum(holder.num_bytes for holder in read_holders(config.copies_dir))
