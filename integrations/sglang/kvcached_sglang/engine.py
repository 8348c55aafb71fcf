"""One SGLang scheduler's memory: what SGLang's settings say of it, and the one of this process."""

import logging
from typing import TYPE_CHECKING, Any

from kvcached_core.config import Config, read_config
from kvcached_core.engine.joining import Group
from kvcached_core.engine.looping import LoopingEngine
from kvcached_core.engine.ranks import NUM_IDLE_TURNS
from kvcached_core.engine.start import model_name
from kvcached_core.errors import GeometryError, KVCachedError, UnsupportedEngineError
from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import MAX_ID, Geometry
from kvcached_core.memory.layer_tensors import PoolShape
from kvcached_core.memory.saved_memory import SavedMemory
from kvcached_core.memory.torch_device import current_stream, reserved_bytes
from kvcached_core.weights.counted_tier import CountedTier
from kvcached_patches.around import around_found
from kvcached_sglang.demand import named_blocks
from kvcached_sglang.drafts import Drafts
from kvcached_sglang.elastic_weights import may_yield
from kvcached_sglang.host_tier import KEYS, SETTING, STATES, WINDOW, is_offloading, size_tier
from kvcached_sglang.obstacles import has_elastic_states, has_two_pools
from kvcached_sglang.open_copies import OpenCopies
from kvcached_sglang.parallel import data_rank_of, group_of
from kvcached_sglang.port import SglangPort
from kvcached_sglang.startup import startup
from kvcached_sglang.states import States

if TYPE_CHECKING:
    from kvcached_core.weights.own_weights import OwnWeights
    from kvcached_core.weights.restart import Restart

logger = logging.getLogger("sglang.kvcached")


class SglangEngine(LoopingEngine):
    """The memory of one scheduler process, from its first size to its end.

    Attributes:
        saved: What SGLang's memory saver has.
        may_yield: Whether weights shall be given, too.
        own_weights: They, once they are loaded.
        restart: How they were loaded, where a host copy may have them; None: by SGLang alone.
        tier: Its host tier, where it has one, on the first rank.
        copies: Its copies between the device and that.
        drafts: Its draft models, where it decodes speculatively.
        states: Those of its model's layers, where they lie in our pages.

    Args:
        device: Where the KV cache lies, as torch names it.
        server_args: SGLang's settings.
        context_tokens: The longest request.
        config: Ours.
        group: The ranks that share the model.
        num_pools: 1, or 2 where layers with a sliding window, or with states, have their own.
        has_states: Whether it is states that do.
        data_rank: See `Instance`.
    """

    port: SglangPort

    def __init__(
        self,
        device: Any,
        server_args: Any,
        context_tokens: int,
        config: Config,
        group: Group = Group(),  # noqa: B008  it is frozen
        num_pools: int = 1,
        *,
        has_states: bool = False,
        data_rank: int = 0,
    ) -> None:
        self.tier: CountedTier | None = None
        self.copies: OpenCopies | None = None
        self.drafts = Drafts()
        does_loop_sleep = getattr(server_args, "sleep_on_idle", False)  # a second in an idle turn
        super().__init__(
            SglangPort(server_args.max_prefill_tokens, current_stream(device)),
            config,
            device,
            group,
            name=model_name(server_args.served_model_name or server_args.model_path),
            engine=startup.engine,
            logger=logger,
            request_tokens=context_tokens,
            length_setting="--context-length",
            num_pools=num_pools,
            num_arenas=num_pools if has_states else 1,
            num_idle_turns=1 if does_loop_sleep else NUM_IDLE_TURNS,
            data_rank=data_rank,
        )
        self.saved = SavedMemory(reserved_bytes(device))
        self.may_yield = may_yield(server_args, config)
        self.own_weights: OwnWeights | None = None
        self.restart: Restart | None = None
        self.port.states = self.states = States(self) if has_states else None
        if is_offloading(server_args):
            self._offload(server_args)

    @property
    def has_all_pools(self) -> bool:
        """Whether no pool comes any more that lies in our pages."""
        return self.placing.is_complete and not self.drafts.is_expected

    def place_pool(self, shape: PoolShape, num_layers: int) -> tuple[Geometry, Arena]:
        """Place a pool as `place` does, with room for the planes of drafts, if it can be served.

        Args:
            shape: The pool's own planes.
            num_layers: Its layers.

        Raises:
            KVCachedError: As `place`.
            UnsupportedEngineError: If its planes differ in block size beside a host tier, or its
                tokens have numbers that SGLang's tables cannot hold.
        """
        if shape.others and self.copies is not None:
            raise UnsupportedEngineError(
                "HiCache of a pool whose planes differ in block size: nobody has tried it; remove "
                "--enable-hierarchical-cache"
            )
        geometry, arena = self.place(self.drafts.with_planes(shape, num_layers))
        num_tokens = geometry.num_ids(arena.num_pages) * shape.block_tokens
        if num_tokens > MAX_ID:
            raise GeometryError(
                f"{arena.num_pages} pages of {geometry.page_bytes} bytes need numbers of tokens up "
                f"to {num_tokens}, allowed are numbers below {MAX_ID}; lower KVCACHED_LIMIT"
            )
        return geometry, arena

    def check(self, scheduler: Any, batch: Any) -> None:
        """Refuse a batch that names a block which is not mapped: see `RankMemory.check_blocks`."""
        named = named_blocks(scheduler, batch, self.port.block_tokens).tolist()
        self._check_blocks(named)
        if self.states is not None:
            self.states.check(scheduler, batch)

    def pool_of(self, name: str) -> int | None:
        """Return which of our pools SGLang's HiCache calls so; None where none of ours is meant."""
        if name == KEYS:
            return 0
        second = STATES if self.states is not None else WINDOW
        return 1 if name == second and len(self.free_lists) > 1 else None

    def check_copied(self, ids: Any, pool: int) -> None:
        """Refuse a copy of what is not mapped."""
        self._check_blocks((ids // self.port.ids_of_block(pool)).tolist(), pool)

    def _check_blocks(self, named: list[int], pool: int = 0) -> None:
        pages = self.pools[pool]
        self.memory.check_blocks(named, pages.geometry, pages.book.first_page)  # type: ignore[union-attr]

    def hold(self, ids: list[Any], number: int, pool: int = 0) -> None:
        """Keep the pages of tokens or states mapped until that copy is released.

        Args:
            ids: Tensors of their ids.
            number: The copy's.
            pool: Which of the pools has them.
        """
        import torch

        block_ids = self.port.ids_of_block(pool)
        self.free_lists[pool].hold(lambda: torch.cat(ids) // block_ids, number)

    def map_for_copies(self) -> None:
        """Have all mapped, and zeroed, that was opened since the schedule began."""
        self.begin_batch()
        self.memory.backend.synchronize()  # type: ignore[union-attr]

    def _offload(self, server_args: Any) -> None:
        instance = self.ranks.instance
        num_bytes = size_tier(server_args, self.virtual_bytes)
        try:
            if instance is not None:
                self.tier = CountedTier(self.config, instance.name, num_bytes, setting=SETTING)
                self._open.callback(self.tier.close)
        except KVCachedError:
            self.close()
            raise
        self.port.copies = self.copies = OpenCopies(self, self.tier)


_engine: SglangEngine | None = None


def start_engine(runner: Any) -> SglangEngine:
    """Return this process's engine, made at the first call.

    Args:
        runner: SGLang's model runner, or what plans the KV cache for it.
    """
    global _engine  # noqa: PLW0603  one scheduler, one engine in a process
    if _engine is None:
        import torch

        _engine = SglangEngine(
            torch.device(runner.device),
            runner.server_args,
            runner.model_config.context_len,
            read_config(),
            group_of(runner.server_args),
            num_pools=2 if has_two_pools(runner) or has_elastic_states(runner) else 1,
            has_states=has_elastic_states(runner),
            data_rank=data_rank_of(runner),
        )
    return _engine


def engine() -> SglangEngine | None:
    """Return this process's engine, or None where SGLang is served as it is."""
    return _engine


# For hooks that do nothing where SGLang is served as it is.
around_engine = around_found(lambda _self: engine())
