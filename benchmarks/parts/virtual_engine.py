"""An elastic engine's pool, ledger and hooks under a scheduler in virtual time."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from parts.virtual_scheduler import Scheduler, make_manager

from kvcached_core.config import HOST, read_config
from kvcached_core.memory.devices import Device
from kvcached_core.memory.orders import PageOrders
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import MIB

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.configurations import configuration
from helpers.no_pace import HeardBell, let_no_pace_count

BLOCK_BYTES, NUM_PLANES = 128 * 1024, 8  # of the tiny model: a block has 1 MiB in all
GRANULARITY_BYTES = 2 * MIB


class Unzeroed(HostBackend):
    """Memory that Linux provides at the first touch: nobody touches it here."""

    def map(self, address: int, handle: Any) -> None:
        """Note that it is mapped."""
        self._mappings.check_map(address, handle)
        self._mappings.add(address, handle)

    def unmap(self, address: int, handle: Any) -> None:
        """Note that it is not mapped any more."""
        self._mappings.check_unmap(address, handle)
        self._mappings.remove(address, handle)


class Elastic(Scheduler):
    """The same with an elastic engine's pool; its worker is in this process, too.

    Args:
        pool_bytes: What it shares with others.
        map_seconds: What mapping a page takes, and unmapping one.
        words: What a `Scheduler` takes.
        variables: Its settings, with the folder of its ledger.
    """

    def __init__(
        self,
        pool_bytes: int,
        map_seconds: tuple[float, float],
        *words: Any,
        **variables: str,
    ) -> None:
        from kvcached_vllm.engine import VllmEngine

        super().__init__(*words)
        self._map_seconds = map_seconds
        self._seconds = 0.0
        executor = SimpleNamespace(collective_rpc=self._call)
        config = read_config(variables | {"KVCACHED_NAME": self.side})
        limits = SimpleNamespace(model=self.side, max_model_len=self.sizes.max_tokens)
        self.engine = VllmEngine(
            configuration(model_config=limits),
            config,
            [Device(HOST, "host", pool_bytes)],
            SimpleNamespace(scheduler=self, model_executor=executor),
        )
        num_blocks = pool_bytes // (BLOCK_BYTES * NUM_PLANES)
        tensors = [SimpleNamespace(size=BLOCK_BYTES * num_blocks) for _ in range(NUM_PLANES)]
        plan = {"kv_cache_tensors": tensors, "num_blocks": num_blocks, "kv_cache_groups": []}
        self.engine.place([SimpleNamespace(**plan)], GRANULARITY_BYTES)
        geometry, seat = self.engine.geometry, self.engine.instance.seat(self.engine.devices[0])
        num_pages = num_blocks // geometry.blocks_per_page
        self.kvcached = RankMemory(geometry, num_pages, seat, Unzeroed())
        self.begin(make_manager(num_blocks, self.sizes, self.engine))

    def end_schedule(self) -> float:
        """Map and unmap what the schedule decided; see `Scheduler`."""
        return self._carry_out(self.engine.end_schedule())

    def between_steps(self) -> float:
        """Give what neighbours want; see `Scheduler`."""
        self._seconds = 0.0
        HeardBell.hear()
        self.engine.between_steps()
        return self._seconds

    def close(self) -> None:
        """Leave the ledger."""
        self.kvcached.close()
        self.engine.close()

    def _call(self, method: Any, args: Any = ()) -> list[Any]:
        if args and isinstance(args[0], PageOrders):
            self._seconds += self._count(args[0])
        return [method(self, *args)]

    def _carry_out(self, orders: PageOrders | None) -> float:
        if orders is None:
            return 0.0
        self.kvcached.carry_out(orders)
        return self._count(orders)

    def _count(self, orders: PageOrders) -> float:
        num_mapped = sum(map(len, (orders.map_pages, orders.ready_pages, orders.spare_pages)))
        self.counts["mapped_pages"] += num_mapped
        self.counts["unmapped_pages"] += len(orders.unmap_pages)
        to_map, to_unmap = self._map_seconds
        return num_mapped * to_map + len(orders.unmap_pages) * to_unmap


def hook() -> None:
    """Put our hooks on vLLM's manager; they leave a manager over vLLM's own pool alone.

    Bells are heard between steps and orders carried out at once: no thread's pace changes anything.
    """
    let_no_pace_count()
    from vllm.v1.core import kv_cache_coordinator
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    from kvcached_vllm import engine_hooks

    for owner, name, wrap in (
        (KVCacheManager, "__init__", engine_hooks.kv_cache_manager_init),
        (KVCacheManager, "allocate_slots", engine_hooks.kv_cache_manager_allocate_slots),
        (kv_cache_coordinator, "BlockPool", engine_hooks.block_pool_factory),
    ):
        setattr(owner, name, wrap(getattr(owner, name)))
