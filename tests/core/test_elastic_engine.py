"""The contract of engines, kept by one that is nothing but a port."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.engine_contract import *  # noqa: F403  the tests that every engine passes
from helpers.fake_engine import FakeEngine
from helpers.house import House


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(FakeEngine, tmp_path / "kv")
    yield made
    made.close()
