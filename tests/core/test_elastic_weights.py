"""The contract of engines whose weights yield, kept by one that is nothing but a port.

Its weights are a worker's, and once more such as a test can count.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from helpers.fake_engine import FakeEngine
from helpers.fake_weights import FakeWeights
from helpers.held_weights import HeldWeights
from helpers.house import House
from helpers.weights_contract import *  # noqa: F403  the tests that every engine passes


@pytest.fixture(params=[HeldWeights, FakeWeights])
def house(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[House]:
    monkeypatch.setattr("kvcached_core.weights.rank_row.PATIENCE_SECONDS", 0.02)
    make = partial(FakeEngine, make_weights=request.param)
    made = House(make, tmp_path / "kv", weights="yield")
    yield made
    made.close()
