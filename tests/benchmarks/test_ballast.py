"""A GPU made as small as a pool, on a ledger of the host."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from multi_model.ballast import Ballast

from kvcached_core.ledger.ledger import Ledger
from kvcached_demo.harness.plan import KV
from kvcached_demo.harness.servers import open_ledger

CAPACITY_BYTES, POOL_BYTES = 1000, 300


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    (tmp_path / KV).mkdir(mode=0o700)
    with Ledger(tmp_path / KV / "host.ledger", capacity_bytes=CAPACITY_BYTES) as made:
        yield made


def test_engines_may_get_the_pool_and_no_more(ledger: Ledger, tmp_path: Path) -> None:
    row = ledger.register(name="m0", engine="vllm")
    ledger.promise(row, 100, 1)
    ballast = Ballast(open_ledger(tmp_path / KV), POOL_BYTES)
    assert ledger.room_bytes(row) == POOL_BYTES - 100
    ballast.close()
    assert ledger.room_bytes(row) == CAPACITY_BYTES - 100


def test_what_grew_beside_the_engines_is_not_taken_from_their_pool(
    ledger: Ledger, tmp_path: Path
) -> None:
    row = ledger.register(name="m0", engine="vllm")
    ballast = Ballast(open_ledger(tmp_path / KV), POOL_BYTES)
    ledger.announce(ledger.register(name="m1", engine="vllm"), 50)
    assert ledger.room_bytes(row) == POOL_BYTES - 50
    ballast.adjust()
    assert ledger.room_bytes(row) == POOL_BYTES
    ballast.adjust()
    assert ledger.room_bytes(row) == POOL_BYTES
