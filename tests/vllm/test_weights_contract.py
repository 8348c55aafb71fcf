"""The contract of engines whose weights yield, kept by vLLM's adapter; there is no model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.house import House
from helpers.vllm_served import VllmServed
from helpers.weights_contract import *  # noqa: F403  the tests that every engine passes

pytestmark = [pytest.mark.vllm, pytest.mark.older_release]


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr("kvcached_core.weights.rank_row.PATIENCE_SECONDS", 0.02)
    made = House(VllmServed, tmp_path / "kv", weights="yield")
    yield made
    made.close()
