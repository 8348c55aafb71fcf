"""The contract of engines, kept by SGLang's adapter over its own pool and allocator."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.engine_contract import *  # noqa: F403  the tests that every engine passes
from helpers.house import House
from helpers.sglang_served import SglangServed

pytestmark = pytest.mark.sglang


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(SglangServed, tmp_path / "kv")
    yield made
    made.close()
