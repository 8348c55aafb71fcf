"""Placing pools: whole pages, a request that fits, page 0 promised, and two pools on one heap."""

import logging
from dataclasses import replace
from typing import Any

import pytest

from kvcached_core.config import HOST, Config, read_config
from kvcached_core.engine.placing import Placing, Planes, pool_settings, virtual_bytes
from kvcached_core.errors import ConfigError, GeometryError
from kvcached_core.memory.devices import Device
from kvcached_core.units import GIB, MIB

DEVICE = Device(HOST, "host", GIB)
PLANES = Planes(64 * 1024, 8, num_blocks=1000, request_blocks=100, block_tokens=(16,))
PER_PAGE = 32  # blocks of these planes in a page of 16 MiB
LOGGER = logging.getLogger("engine.kvcached")


class Rows:
    """The ledgers of an engine: what they are told, in order."""

    def __init__(self, *, has_room: bool = True) -> None:
        self.capacity_bytes = GIB
        self.has_room = has_room
        self.told: list[Any] = []

    def describe(self, **sizes: int) -> None:
        self.told.append(sizes)

    def announce(self, static_bytes: int) -> None:
        self.told.append(("announce", static_bytes))

    def promise_first_page(self) -> str | None:
        self.told.append("first page")
        return None if self.has_room else "4 MiB of 16 MiB are missing"


@pytest.fixture
def config() -> Config:
    return read_config({})


def placing(rows: Rows, config: Config, num_pools: int = 1) -> Placing:
    return Placing(rows, config, DEVICE, LOGGER, length_setting="--length", num_pools=num_pools)


def test_the_settings_say_how_many_pages_are_spare_and_how_long_they_stay() -> None:
    variables = {"KVCACHED_MAX_SPARE_PAGES": "5", "KVCACHED_IDLE_SECONDS": "3"}
    assert placing(Rows(), read_config(variables)).page_options == {
        "min_spare_pages": 1,
        "max_spare_pages": 5,
        "idle_seconds": 3.0,
    }


def test_the_ledgers_know_the_sizes_before_a_page_is_promised(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    rows = Rows()
    place = placing(rows, config)
    with caplog.at_level(logging.INFO, LOGGER.name):
        geometry = place.place(PLANES, 2 * MIB)
    assert geometry.blocks_per_page == PER_PAGE
    sizes = {"page_bytes": 16 * MIB, "num_pages": 31, "least_pages": 4, "token_bytes": 32 * 1024}
    assert rows.told == [sizes, ("announce", 0), "first page"]
    assert (place.num_pages, place.is_complete) == (31, True)
    (line,) = caplog.messages
    assert "31 pages of 16 MiB, 32 blocks each, of 1 GiB that host has" in line


@pytest.mark.parametrize(("is_exact", "num_pages"), [(False, 31), (True, 32)])
def test_blocks_that_fill_no_whole_page_are_left_out_or_get_one(
    config: Config, num_pages: int, *, is_exact: bool
) -> None:
    place = placing(Rows(), config)
    place.place(replace(PLANES, is_exact=is_exact), 2 * MIB)
    assert place.num_pages == num_pages


@pytest.mark.parametrize(
    ("request_blocks", "least_pages"), [(31, 1), (32, 2), (63, 2), (64, 3), (991, 31)]
)
def test_the_longest_request_needs_its_blocks_and_the_padding_block(
    config: Config, request_blocks: int, least_pages: int
) -> None:
    rows = Rows()
    placing(rows, config).place(replace(PLANES, request_blocks=request_blocks), 2 * MIB)
    assert rows.told[0]["least_pages"] == least_pages


def test_a_pool_smaller_than_one_request_is_refused_with_both_numbers(config: Config) -> None:
    rows = Rows()
    with pytest.raises(
        ConfigError,
        match=r"as long as --length allows: needed 992 blocks \(496 MiB\), available 991 in 31 "
        r"pages of 16 MiB; raise KVCACHED_HOST_POOL or KVCACHED_LIMIT, or lower --length",
    ):
        placing(rows, config).place(replace(PLANES, request_blocks=992), 2 * MIB)
    assert rows.told == []


def test_a_start_without_room_for_a_page_says_what_is_missing(config: Config) -> None:
    with pytest.raises(
        ConfigError, match=r"first page: 4 MiB of 16 MiB are missing; .*KVCACHED_HOST_POOL"
    ):
        placing(Rows(has_room=False), config).place(PLANES, 2 * MIB)


def test_two_pools_share_the_pages_and_a_request_needs_some_of_each(config: Config) -> None:
    rows = Rows()
    place = placing(rows, config, num_pools=2)
    first = place.place(PLANES, 2 * MIB)
    assert not place.is_complete
    second = place.place(replace(PLANES, num_planes=4, request_blocks=64), 2 * MIB)
    assert place.is_complete
    assert second.page_bytes == first.page_bytes
    assert second.blocks_per_page == 2 * PER_PAGE
    assert place.num_pages == 1 + 64  # all that the device has, and page 0 of the padding blocks
    least = [sizes["least_pages"] for sizes in rows.told if isinstance(sizes, dict)]
    assert least == [1 + 4, 1 + 4 + 1]
    assert rows.told.count("first page") == 1


def test_a_token_counts_in_every_pool_and_in_every_group_of_a_pool(config: Config) -> None:
    rows = Rows()
    place = placing(rows, config, num_pools=2)
    place.place(replace(PLANES, block_tokens=(16, 16, 64)), 2 * MIB)
    place.place(replace(PLANES, num_planes=4), 2 * MIB)
    block_bytes = 8 * 64 * 1024
    one, both = [sizes["token_bytes"] for sizes in rows.told if isinstance(sizes, dict)]
    assert one == 2 * block_bytes // 16 + block_bytes // 64
    assert both == one + block_bytes // 2 // 16


def test_the_bytes_of_a_token_are_never_too_few() -> None:
    assert replace(PLANES, num_planes=1, block_tokens=(48,)).token_bytes == -(-64 * 1024 // 48)


def test_a_second_pool_that_does_not_fit_the_pages_is_refused(config: Config) -> None:
    place = placing(Rows(), config, num_pools=2)
    place.place(PLANES, 2 * MIB)
    with pytest.raises(GeometryError):
        place.place(replace(PLANES, block_bytes=64 * MIB), 2 * MIB)
    assert not place.is_complete


def test_ranks_on_one_device_share_what_it_has(config: Config) -> None:
    assert virtual_bytes(config, GIB, 2) == virtual_bytes(config, GIB, 1) // 2
    assert pool_settings(replace(DEVICE, kind="cuda")) == "KVCACHED_LIMIT"
