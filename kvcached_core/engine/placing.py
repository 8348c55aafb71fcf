"""Where the pools of an engine lie: their geometry, their size in the ledgers, their first page."""

import logging
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Protocol

from kvcached_core.config import HOST, Config
from kvcached_core.errors import ConfigError, UnsupportedEngineError
from kvcached_core.memory.devices import Device
from kvcached_core.memory.geometry import MAX_ID, Geometry, fit_geometry
from kvcached_core.memory.seats import Placement, Seat
from kvcached_core.memory.size_classes import SizeClass, choose_any
from kvcached_core.units import format_bytes


@dataclass(frozen=True)
class Planes:
    """The planes of one pool, as its engine plans them.

    Attributes:
        block_bytes: Bytes of a block in one plane.
        num_planes: Planes; the most that a rank has, where ranks differ.
        num_blocks: Blocks of the virtual size, the padding block included.
        request_blocks: Blocks of the longest request.
        block_tokens: Tokens of a block, for each group of layers that has blocks of its own here.
        is_exact: Whether the engine hands out all of these blocks; otherwise it leaves out those
            that fill no whole page.
        others: The planes of other block sizes.
        max_ids: The most ids that the engine's kernels can have of it.
    """

    block_bytes: int
    num_planes: int
    num_blocks: int
    request_blocks: int
    block_tokens: tuple[int, ...]
    is_exact: bool = False
    others: tuple[SizeClass, ...] = ()
    max_ids: int = MAX_ID

    @property
    def classes(self) -> tuple[SizeClass, ...]:
        """The planes of each block size."""
        return (SizeClass(self.block_bytes, self.num_planes), *self.others)

    @property
    def whole_bytes(self) -> int:
        """What one block takes in all planes, in bytes."""
        return sum(each.bytes_of_all for each in self.classes)

    @property
    def token_bytes(self) -> int:
        """What one token takes in all of these layers, as long as no window has dropped it."""
        return sum(ceil(self.whole_bytes / num_tokens) for num_tokens in self.block_tokens)


class Rows(Protocol):
    """The engine in the ledgers of its devices; see `Instance` and `Ranks`."""

    @property
    def capacity_bytes(self) -> int:
        """What instances may hold together on the device that has least."""

    def describe(
        self, *, page_bytes: int, num_pages: int, least_pages: int, token_bytes: int
    ) -> None:
        """Say how large a page and a token are, how many pages, and what a request needs."""

    def announce(self, static_bytes: int) -> None:
        """Say what is still about to be allocated beside the KV cache."""

    def promise_first_page(self) -> str | None:
        """Have one page promised; otherwise return what is missing, and who holds it."""


class Placing:
    """The pools of one engine: in one arena, a page one pool's at a time, or each in its own.

    All pages have one size, so what one pool does not have, another may have.

    The scheduler's thread calls it, at the start.

    Args:
        rows: Who promises the first page, and is told the sizes.
        config: The settings.
        device: Where the pools lie; of several ranks, the first one's device.
        logger: The engine's: it shows no other.
        length_setting: The engine's setting for the longest request.
        num_pools: How many there will be. Where several share an arena, page 0 is for the padding
            block of each, and for no other.
        num_arenas: 1, or one for each pool.

    Attributes:
        is_shared: Whether several pools share an arena.
        num_pages: Pages of the virtual size.
        least_pages: What the longest request needs.
    """

    def __init__(
        self,
        rows: Rows,
        config: Config,
        device: Device,
        logger: logging.Logger,
        *,
        length_setting: str,
        num_pools: int = 1,
        num_arenas: int = 1,
    ) -> None:
        self.num_pools = num_pools
        self.is_shared = num_pools > num_arenas
        self.num_pages = 0
        self.geometries: list[Geometry] = []
        self._rows = rows
        self._config = config
        self._device = device
        self._logger = logger
        self._length_setting = length_setting
        self.least_pages = int(self.is_shared)
        self._token_bytes = 0

    @property
    def is_complete(self) -> bool:
        """Whether every pool has its place."""
        return len(self.geometries) == self.num_pools

    @property
    def page_options(self) -> dict[str, Any]:
        """What the settings say of pages here, for `Pages`."""
        low, high = self._config.spare_pages(self._device.kind)
        return {
            "min_spare_pages": low,
            "max_spare_pages": high,
            "idle_seconds": self._config.idle_seconds,
        }

    def place(self, planes: Planes, granularity_bytes: int, num_ranks: int = 1) -> Geometry:
        """Choose a pool's geometry; with the first one page 0 is promised.

        Args:
            planes: The pool's planes.
            granularity_bytes: The device's, in bytes.
            num_ranks: Ranks of this engine on the device, which share what it has.

        Raises:
            ConfigError: If the pool cannot hold one request, or there is no room for a page.
            GeometryError: If there are too many ids, or a second pool does not fit the pages.
            PolicyError: If the floors of others leave no room for one request.
        """
        is_first = not self.geometries
        geometry = self._choose(planes, granularity_bytes)
        if is_first and self.num_pools > 1:  # the other pools' pages as well, and a page 0 of all
            whole_bytes = virtual_bytes(self._config, self._rows.capacity_bytes, num_ranks)
            self.num_pages = self.is_shared + -(-whole_bytes // geometry.page_bytes)
        elif is_first:
            last_blocks = geometry.blocks_per_page - 1 if planes.is_exact else 0
            self.num_pages = (planes.num_blocks + last_blocks) // geometry.blocks_per_page
        num_pages = self.pages_of(planes, geometry)
        geometry.check_ids(num_pages)
        self._describe(planes, geometry, num_pages)
        if is_first or not self.is_shared:
            self._promise_first_page()
        self.geometries.append(geometry)
        self._logger.info(
            "kvcached: %d pages of %s, %d blocks each, of %s that %s has for KV caches",
            num_pages,
            format_bytes(geometry.page_bytes),
            geometry.blocks_per_page,
            format_bytes(self._rows.capacity_bytes),
            self._device.name,
        )
        return geometry

    def pages_of(self, planes: Planes, geometry: Geometry) -> int:
        """Return how many pages a pool may have: as many as there are, and as its ids allow."""
        beyond_first = (planes.max_ids - geometry.blocks_per_page) // geometry.ids_per_page
        return min(self.num_pages, 1 + beyond_first) if planes.max_ids < MAX_ID else self.num_pages

    def placement(self, seat: Seat, num_planes: int) -> Placement:
        """Return where the first pool lies on a rank, which has `num_planes` of its planes.

        With several block sizes these are planes of the first.
        """
        return Placement(replace(self.geometries[0], num_planes=num_planes), self.num_pages, seat)

    def explain_size(self) -> str:
        """Say where the size comes from that the engine was told, where it finds it too small."""
        size = format_bytes(self._config.virtual_bytes(self._rows.capacity_bytes))
        return (
            f"what is called available memory is what this engine may take here, {size}; raise "
            f"{pool_settings(self._device)}, or lower {self._length_setting}"
        )

    def _choose(self, planes: Planes, granularity_bytes: int) -> Geometry:
        if planes.others and (self.is_shared or self.geometries):
            sizes = sorted(each.block_bytes for each in planes.classes)
            raise UnsupportedEngineError(
                f"layers that differ in block size ({sizes} bytes) in one of {self.num_pools} "
                "pools: each of them needs one size"
            )
        if self.geometries:
            return fit_geometry(
                block_bytes=planes.block_bytes,
                num_planes=planes.num_planes,
                page_bytes=self.geometries[0].page_bytes,
            )
        return choose_any(
            planes.classes,
            granularity_bytes=granularity_bytes,
            target_page_bytes=self._config.page_bytes,
        )

    def _describe(self, planes: Planes, geometry: Geometry, num_pages: int) -> None:
        num_padding_blocks = int(not self.is_shared)
        num_pages -= int(self.is_shared)
        available = num_pages * geometry.blocks_per_page - num_padding_blocks
        needed = planes.request_blocks
        if needed > available:
            raise ConfigError(
                f"the pool is smaller than one request as long as {self._length_setting} allows: "
                f"needed {needed} blocks ({format_bytes(needed * planes.whole_bytes)}), available "
                f"{max(available, 0)} in {num_pages} pages of {format_bytes(geometry.page_bytes)}; "
                f"raise {pool_settings(self._device)}, or lower {self._length_setting}"
            )
        self.least_pages += ceil((needed + num_padding_blocks) / geometry.blocks_per_page)
        self._token_bytes += planes.token_bytes
        self._rows.describe(
            page_bytes=geometry.page_bytes,
            num_pages=self.num_pages,
            least_pages=self.least_pages,
            token_bytes=self._token_bytes,
        )

    def _promise_first_page(self) -> None:
        self._rows.announce(0)  # weights are there, and everybody sees them
        shortage = self._rows.promise_first_page()
        if shortage is not None:
            raise ConfigError(
                f"there is no room for this engine's first page: {shortage}; stop another engine "
                f"or raise {pool_settings(self._device)}"
            )


def virtual_bytes(config: Config, capacity_bytes: int, num_ranks: int) -> int:
    """Return what an engine is told that it has for its KV cache: a rank's part of it, in bytes.

    Ranks on one device share what it has; a prompt has to fit into the part of one.
    """
    return config.virtual_bytes(capacity_bytes) // num_ranks


def pool_settings(device: Device) -> str:
    """Return the settings that give an engine on `device` more memory."""
    return "KVCACHED_HOST_POOL or KVCACHED_LIMIT" if device.kind == HOST else "KVCACHED_LIMIT"
