"""The contract of engines whose weights yield, kept by SGLang's adapter over its own allocator."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.house import House
from helpers.sglang_served import SglangServed
from helpers.weights_contract import *  # noqa: F403  the tests that every engine passes

pytestmark = pytest.mark.sglang


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(SglangServed, tmp_path / "kv", weights="yield")
    yield made
    made.close()
