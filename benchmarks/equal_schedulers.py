"""Two equally busy vLLM schedulers on one pool, beside two with half of it each, in virtual time.

    python benchmarks/equal_schedulers.py --json benchmarks/results/equal_schedulers.json

Sharing has nothing to gain here: both always want more than half. There is no model: vLLM's own
managers of a KV cache, our hooks, pools and ledger, and a clock that is set. A step takes a fixed
time and some for each of its tokens; mapping and unmapping a page takes what it was measured to
take. So nothing that the machine does beside changes a number, and what is left are the decisions:
who is let in, who is preempted, and who finds a prefix.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from equal_asks import SIDES
from machine import describe_machine
from virtual_scheduler import MAX_TOKENS, Scheduler, make_manager
from virtual_time import clock

from kvcached_core.config import HOST, read_config
from kvcached_core.memory.devices import Device
from kvcached_core.memory.orders import PageOrders
from kvcached_core.memory.rank import RankMemory
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import MIB

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.configurations import configuration

BLOCK_BYTES, NUM_PLANES = 128 * 1024, 8  # of the tiny model: a block has 1 MiB in all
MAP_SECONDS, UNMAP_SECONDS = 0.0066, 0.0014
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
        folder: Where the ledger lies.
        pool_bytes: What it shares with others.
    """

    def __init__(self, side: str, num_clients: int, folder: Path, pool_bytes: int) -> None:
        from kvcached_vllm.engine import VllmEngine

        super().__init__(side, num_clients)
        self._seconds = 0.0
        executor = SimpleNamespace(collective_rpc=self._call)
        config = read_config({"KVCACHED_DIR": str(folder), "KVCACHED_NAME": side})
        self.engine = VllmEngine(
            configuration(model_config=SimpleNamespace(model=side, max_model_len=MAX_TOKENS)),
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
        self.begin(make_manager(num_blocks, self.engine))

    def end_schedule(self) -> float:
        """Map and unmap what the schedule decided; see `Scheduler`."""
        return self._carry_out(self.engine.end_schedule())

    def between_steps(self) -> float:
        """Give what neighbours want; see `Scheduler`."""
        self._seconds = 0.0
        self.engine.between_steps()
        self.kvcached.keeper.wait()
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
        return num_mapped * MAP_SECONDS + len(orders.unmap_pages) * UNMAP_SECONDS


def play(schedulers: list[Any], seconds: float) -> dict[str, Any]:
    """Let schedulers make their steps side by side; return what came of all of them."""
    end = clock.seconds + seconds
    while (following := min(schedulers, key=lambda one: one.at)).at < end:
        clock.seconds = max(clock.seconds, following.at)
        following.step()
    clock.seconds = end
    names = schedulers[0].counts
    total: dict[str, Any] = {name: sum(one.counts[name] for one in schedulers) for name in names}
    total["hit_rate"] = total["found_in_the_cache"] / max(total["prompt_tokens"], 1)
    return total | {"answers_of_each": [one.counts["answers"] for one in schedulers]}


def hook() -> None:
    """Put our hooks on vLLM's manager; they leave a manager over vLLM's own pool alone."""
    from vllm.v1.core import kv_cache_coordinator
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    from kvcached_vllm import engine_hooks

    for owner, name, wrap in (
        (KVCacheManager, "__init__", engine_hooks.kv_cache_manager_init),
        (KVCacheManager, "allocate_slots", engine_hooks.kv_cache_manager_allocate_slots),
        (kv_cache_coordinator, "BlockPool", engine_hooks.block_pool_factory),
    ):
        setattr(owner, name, wrap(getattr(owner, name)))


def play_vanilla(num_clients: int, seconds: float, pool_bytes: int) -> dict[str, Any]:
    """Play two schedulers that have half of the pool each."""
    schedulers = [Scheduler(side, num_clients) for side in SIDES]
    for each in schedulers:
        each.begin(make_manager(pool_bytes // (BLOCK_BYTES * NUM_PLANES) // len(SIDES)))
    return play(schedulers, seconds)


def play_elastic(num_clients: int, seconds: float, pool_bytes: int) -> dict[str, Any]:
    """Play two schedulers that share the pool."""
    with tempfile.TemporaryDirectory(prefix="kv-") as folder:
        schedulers = [Elastic(side, num_clients, Path(folder), pool_bytes) for side in SIDES]
        try:
            return play(schedulers, seconds)
        finally:
            for each in schedulers:
                each.close()


def main() -> None:
    """Play both, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="of virtual time")
    parser.add_argument("--clients", type=int, default=8, help="of each scheduler")
    parser.add_argument("--pool-mib", type=int, default=256)
    options = parser.parse_args()
    machine = describe_machine()
    hook()
    words = (options.clients, options.seconds, options.pool_mib * MIB)
    results: dict[str, Any] = {
        "machine": machine,
        "virtual_seconds": options.seconds,
        "clients_of_each": options.clients,
        "pool_bytes": options.pool_mib * MIB,
        "vanilla": play_vanilla(*words),
        "elastic": play_elastic(*words),
    }
    results["ratio"] = results["elastic"]["answers"] / results["vanilla"]["answers"]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps({key: results[key] for key in results if key != "machine"}, indent=2))


if __name__ == "__main__":
    main()
