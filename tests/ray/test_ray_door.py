"""A door goes by each table of the cluster, whatever the rules in it say."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.loops import on_a_loop
from helpers.waiting import PATIENCE_SECONDS

from kvcached_ray.door import Door
from kvcached_ray.report import Rules, Table


class Unopened(Door):
    """A door that has nothing to close."""

    def __del__(self) -> None:  # type: ignore[override]  # Serve would await it
        """Do nothing."""


class Tables:
    """Tells of tables one after the other, and then of no more."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = list(tables)

    async def remote(self, _version: int) -> Table:
        if not self._tables:
            await asyncio.Event().wait()
        return self._tables.pop(0)


@on_a_loop
async def test_rules_that_cannot_be_read_end_no_door(caplog: pytest.LogCaptureFixture) -> None:
    unknown = Rules(b'{"of_another_release": 1}', None)
    tables = Tables([Table(1, unknown), Table(2, unknown), Table(3)])
    followed = asyncio.Queue[int]()
    leases: Any = SimpleNamespace(follow=lambda table: followed.put_nowait(table.version))
    door = Unopened(SimpleNamespace(table=tables), None)
    task = asyncio.ensure_future(door._follow(leases))
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert [await followed.get() for _ in range(3)] == [1, 2, 3]
    assert "rules cannot be read" in caplog.text
    task.cancel()
