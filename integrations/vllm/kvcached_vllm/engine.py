"""One vLLM engine: where its memory lies, and its block pool."""

from typing import Any

from kvcached_core.config import Config
from kvcached_core.engine.activation import FIRST_LOOK_SECONDS
from kvcached_core.engine.central import CentralEngine
from kvcached_core.engine.placing import Planes
from kvcached_core.engine.start import model_name
from kvcached_core.memory.devices import Device
from kvcached_vllm.layout import PLACEMENT, plane_layout, request_blocks
from kvcached_vllm.port import VllmPort
from kvcached_vllm.startup import startup


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
        super().__init__(
            VllmPort(core),
            config,
            devices,
            name=model_name(vllm_config.model_config.model),
            engine=startup.engine,
            logger=startup.logger,
            length_setting="--max-model-len",
        )

    def place(self, kv_cache_configs: list[Any], granularity_bytes: int) -> None:
        """Choose the geometry and write each rank's placement on its config.

        Raises:
            UnsupportedEngineError: If the planes are not ours to lay out.
            ConfigError: If the pool cannot hold one request.
        """
        layouts = [plane_layout(config) for config in kv_cache_configs]
        widest = max(layouts, key=lambda layout: layout.num_planes)
        plan = kv_cache_configs[0]
        request = request_blocks(plan, self.vllm_config)
        planes = Planes(
            widest.block_bytes,
            widest.num_planes,
            plan.num_blocks,
            request,
            tuple(group.kv_cache_spec.block_size for group in plan.kv_cache_groups),
        )
        depths = [layout.num_planes for layout in layouts]
        placements = self.place_ranks(planes, depths, granularity_bytes)
        for config, placement in zip(kv_cache_configs, placements, strict=True):
            setattr(config, PLACEMENT, placement)
        self.num_groups = max(len(plan.kv_cache_groups), 1)

    def build_pool(self, *args: Any, **kwargs: Any) -> Any:
        """Return the elastic block pool in the place of vLLM's own."""
        from kvcached_vllm.block_pool import ElasticBlockPool

        options = self.placing.page_options
        pool = ElasticBlockPool(self.geometry, self.ranks, *args, options=options, **kwargs)
        pool.engine, pool.giving, pool.num_groups = self, self.giving, self.num_groups
        self.port.pool = pool
        self.pools.append(pool.pages)
        if self.yield_weights(self.config):
            self.ranks.set_alarm(FIRST_LOOK_SECONDS)  # no step may come that would look
        return pool
