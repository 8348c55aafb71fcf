"""The contract of engines whose weights yield, kept by one that is nothing but a port."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.fake_engine import FakeEngine
from helpers.house import House
from helpers.weights_contract import *  # noqa: F403  the tests that every engine passes


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(FakeEngine, tmp_path / "kv", weights="yield")
    yield made
    made.close()
