"""One vLLM engine: where its memory lies, and its block pool."""

from typing import Any

from kvcached_core.config import Config
from kvcached_core.engine.activation import FIRST_LOOK_SECONDS
from kvcached_core.engine.central import CentralEngine
from kvcached_core.engine.placing import Planes
from kvcached_core.engine.start import model_name
from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory.devices import Device
from kvcached_vllm.connectors import offloads
from kvcached_vllm.host_tier import CountedTier, disk_folders, region_of, tier_bytes
from kvcached_vllm.layout import (
    PLACEMENT,
    common_classes,
    plane_layout,
    refuse_untried_copies,
    request_blocks,
)
from kvcached_vllm.left_behind import LeftBehind
from kvcached_vllm.obstacles import layer_obstacle
from kvcached_vllm.open_copies import OpenCopies
from kvcached_vllm.port import VllmPort
from kvcached_vllm.startup import startup
from kvcached_vllm.windows import hit_blocks, refuse_unknown


class VllmEngine(CentralEngine):
    """One vLLM engine in the ledgers of its devices: from its start to its shutdown.

    Args:
        vllm_config: vLLM's settings.
        config: Ours.
        devices: The device of each rank.
        core: The engine core.
    """

    port: VllmPort

    def __init__(self, vllm_config: Any, config: Config, devices: list[Device], core: Any) -> None:
        self.vllm_config, self.config = vllm_config, config
        self.tier: CountedTier | None = None
        super().__init__(
            VllmPort(core),
            config,
            devices,
            name=model_name(vllm_config.model_config.model),
            engine=startup.engine,
            logger=startup.logger,
            length_setting="--max-model-len",
            data_rank=vllm_config.parallel_config.data_parallel_index,
        )
        if offloads(vllm_config):
            try:
                self.tier = CountedTier(
                    config,
                    self.instance.name,
                    tier_bytes(vllm_config),
                    folders=disk_folders(vllm_config),
                    region=region_of(vllm_config),
                )
            except BaseException:
                self.close()
                raise
            self._open.callback(self.tier.close)

    def place(self, kv_cache_configs: list[Any], granularity_bytes: int) -> None:
        """Choose the geometry and write each rank's placement on its config.

        Raises:
            UnsupportedEngineError: If the planes are not ours to lay out.
            ConfigError: If the pool cannot hold one request.
        """
        try:
            layouts = [plane_layout(config) for config in kv_cache_configs]
        except UnsupportedEngineError as error:
            raise UnsupportedEngineError(layer_obstacle(error, self.vllm_config)) from error
        classes = common_classes(layouts)
        plan = kv_cache_configs[0]
        if self.tier is not None:
            refuse_unknown(plan)
            refuse_untried_copies(layouts)
            self.hit_blocks = hit_blocks(plan)
        first, *others = classes
        planes = Planes(
            first.block_bytes,
            first.num_planes,
            plan.num_blocks,
            request_blocks(plan, self.vllm_config),
            tuple(group.kv_cache_spec.block_size for group in plan.kv_cache_groups),
            others=tuple(others),
        )
        depths = [layout.num_planes(first.block_bytes) for layout in layouts]
        placements = self.place_ranks(planes, depths, granularity_bytes)
        for config, placement in zip(kv_cache_configs, placements, strict=True):
            setattr(config, PLACEMENT, placement)
        self.num_groups = max(len(plan.kv_cache_groups), 1)
        self.block_tokens = max(planes.block_tokens, default=1)
        self.block_bytes = sum(layout.bytes_of_block for layout in layouts)  # on all ranks

    def build_pool(self, *args: Any, **kwargs: Any) -> Any:
        """Return the elastic block pool in the place of vLLM's own."""
        from kvcached_vllm.block_pool import ElasticBlockPool
        from kvcached_vllm.offloaded_pool import OffloadedBlockPool

        kind: type[ElasticBlockPool] = ElasticBlockPool
        kwargs["options"] = self.placing.page_options
        if self.tier is not None:
            kind = OffloadedBlockPool
            kwargs["num_host_blocks"] = self.tier.num_bytes // self.block_bytes
        pool = kind(self.geometry, self.ranks, *args, **kwargs)
        pool.engine, pool.giving, pool.num_groups = self, self.giving, self.num_groups
        self.port.pool = pool
        self.pools.append(pool.pages)
        if self.tier is not None:
            block_tokens = self.block_tokens / self.num_groups
            self.tier.token_bytes = self.block_bytes / block_tokens
            if self.hit_blocks:
                self.port.left = LeftBehind(self.port.core, self.geometry, self.hit_blocks)
                pool.pages.on_close = self.port.left.forget_pages
            self.port.copies = OpenCopies(self, pool, len(self.devices), self.tier)
        if self.yield_weights(self.config):
            self.ranks.set_alarm(FIRST_LOOK_SECONDS)  # no step may come that would look
        return pool
