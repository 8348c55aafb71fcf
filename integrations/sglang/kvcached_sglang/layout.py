"""The arena of a scheduler, and how SGLang's pools lie in it: one, or two that share its pages."""

import logging
from collections.abc import Callable
from math import ceil

from kvcached_core.config import HOST, Config
from kvcached_core.engine.ranks import Ranks
from kvcached_core.errors import ConfigError
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.devices import Device
from kvcached_core.memory.geometry import Geometry, choose_geometry, fit_geometry
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.vmm.backend import Backend
from kvcached_core.units import format_bytes
from kvcached_sglang.pools import PoolShape

logger = logging.getLogger("sglang.kvcached")


class Layout:
    """Pools in one arena, made with the first of them. Each page is one pool's at a time.

    Args:
        ranks: Who promises the first page, and is told the sizes.
        backend: Where memory comes from.
        device: Where it lies.
        config: The settings.
        context_tokens: The longest request.
        num_pools: 1, or 2 where layers with a sliding window have a pool of their own. Then page 0
            is for the padding block of both, and no other.
        current_stream: Returns the CUDA stream of the next step.
    """

    def __init__(
        self,
        ranks: Ranks,
        backend: Backend,
        device: Device,
        config: Config,
        context_tokens: int,
        num_pools: int,
        current_stream: Callable[[], int],
    ) -> None:
        self.num_pools = num_pools
        self.num_pages = 0
        self.memory: RankMemory | None = None
        self.geometries: list[Geometry] = []
        self.unmapped: list[int] | None = None
        self._ranks = ranks
        self._backend = backend
        self._device = device
        self._config = config
        self._context_tokens = context_tokens
        self._current_stream = current_stream
        self._least_pages = int(num_pools > 1)

    @property
    def is_complete(self) -> bool:
        """Whether every pool has its place."""
        return len(self.geometries) == self.num_pools

    @property
    def virtual_bytes(self) -> int:
        """What SGLang is told that it has for its KV cache, in bytes: a rank's part of it.

        Ranks on one device share what it has; a prompt has to fit into the part of one.
        """
        whole_bytes = self._config.virtual_bytes(self._ranks.capacity_bytes)
        return whole_bytes // self._ranks.seat.num_ranks

    def place(self, shape: PoolShape) -> tuple[Geometry, Arena]:
        """Choose a pool's geometry; with the first one make the arena, with page 0 mapped.

        Raises:
            ConfigError: If there is no room for the first page.
            GeometryError: If a second pool does not fit the pages of the first one.
        """
        geometry = self._choose(shape)
        geometry.check_ids(self.num_pages)
        least_blocks = min(ceil(self._context_tokens / shape.block_tokens), shape.num_blocks - 1)
        num_padding_blocks = int(self.num_pools == 1)
        self._least_pages += ceil((least_blocks + num_padding_blocks) / geometry.blocks_per_page)
        self._ranks.describe(
            page_bytes=geometry.page_bytes,
            num_pages=self.num_pages,
            least_pages=self._least_pages,
        )
        if self.memory is None:
            self.memory = self._make_memory(geometry)
        self.geometries.append(geometry)
        logger.info(
            "kvcached: %d pages of %s, %d blocks of %d tokens each, of %s that %s has",
            self.num_pages,
            format_bytes(geometry.page_bytes),
            geometry.blocks_per_page,
            shape.block_tokens,
            format_bytes(self._ranks.capacity_bytes),
            self._device.name,
        )
        return geometry, self.memory.arena

    def _choose(self, shape: PoolShape) -> Geometry:
        sizes = {"block_bytes": shape.block_bytes, "num_planes": shape.num_planes}
        if self.geometries:
            return fit_geometry(**sizes, page_bytes=self.geometries[0].page_bytes)
        geometry = choose_geometry(
            **sizes,
            granularity_bytes=self._backend.granularity_bytes,
            target_page_bytes=self._config.page_bytes,
        )
        self.num_pages = -(-shape.num_blocks // geometry.blocks_per_page)
        if self.num_pools > 1:  # the other pool's pages as well, and page 0
            self.num_pages = 1 + -(-self.virtual_bytes // geometry.page_bytes)
            self.unmapped = list(range(1, self.num_pages))
        return geometry

    def _make_memory(self, geometry: Geometry) -> RankMemory:
        self._ranks.announce(0)  # weights are there, and everybody sees them
        if not self._ranks.reserve_first_page():
            setting = "KVCACHED_HOST_POOL or " if self._device.kind == HOST else ""
            raise ConfigError(
                f"there is no room for this engine's first page of {geometry.page_bytes} bytes; "
                f"stop another engine or raise {setting}KVCACHED_LIMIT"
            )
        memory = RankMemory(
            geometry, self.num_pages, self._ranks.seat, self._backend, self._current_stream
        )
        logger.info("kvcached: %s", memory.addresses)
        return memory
