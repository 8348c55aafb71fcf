"""Ranks that differ in how many layers they have: pages hold the most that one has, on all."""

from dataclasses import replace
from typing import Any

import pytest

from kvcached_core.engine.places import planes_of_all
from kvcached_core.engine.placing import Planes
from kvcached_core.engine.ranks import Ranks
from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory.size_classes import SizeClass

PLANES = Planes(64 * 1024, 8, num_blocks=1000, request_blocks=100, block_tokens=(16,))
FEWER = replace(PLANES, num_planes=2)
MIXED = replace(PLANES, others=(SizeClass(4096, 4),))


def on_each(*ranks: Planes) -> list[Planes]:
    """Return the planes that each of several ranks goes by, which have these."""
    told: list[list[int]] = []

    def tell(values: list[int]) -> list[int]:
        told.append(values)
        return values

    seat: Any = None
    for planes in ranks:
        planes_of_all(planes, tell)
    most = Ranks(None, seat, 0, gather=lambda _values: told).most
    return [planes_of_all(planes, most) for planes in ranks]


def test_all_ranks_go_by_the_planes_of_the_one_that_has_most() -> None:
    assert on_each(PLANES, FEWER) == on_each(FEWER, PLANES) == [PLANES, PLANES]
    assert on_each(MIXED, MIXED) == [MIXED, MIXED]


@pytest.mark.parametrize(
    "other",
    [replace(MIXED, num_planes=4), FEWER, replace(PLANES, block_bytes=512)],
)
def test_ranks_that_differ_in_more_are_refused_on_each(other: Planes) -> None:
    mine = PLANES if other.block_bytes != PLANES.block_bytes else MIXED
    for ranks in ((mine, other), (other, mine)):
        with pytest.raises(UnsupportedEngineError, match="use one stage"):
            on_each(*ranks)
