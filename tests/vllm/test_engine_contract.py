"""The contract of engines, kept by vLLM's adapter over its own manager and block pool."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.engine_contract import *  # noqa: F403  the tests that every engine passes
from helpers.house import House
from helpers.vllm_served import VllmServed

pytestmark = [pytest.mark.vllm, pytest.mark.older_release]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(VllmServed, tmp_path / "kv")
    yield made
    made.close()
