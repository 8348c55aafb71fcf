"""What our block pool costs the scheduler, against vLLM's own in the same run, in CPU time."""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parts.machine import describe_machine
from parts.record import write

try:
    from kvcached_core.memory.geometry import Geometry
except ModuleNotFoundError:  # up to 0.1
    from kvcached_core.geometry import Geometry

GEOMETRY = Geometry(block_bytes=65536, num_planes=32, ids_per_page=256, blocks_per_page=8)
NUM_PAGES = 1024
CLOCK = time.thread_time  # what else runs on the machine does not count


class Unlimited:
    """A ledger that grants everything."""

    def promise(self, num_pages: int, *, is_urgent: bool, num_spare: int = 0) -> int:  # noqa: ARG002  the protocol's
        """Grant it."""
        return num_pages + num_spare

    def cancel(self, num_pages: int) -> None:
        """Forget it."""


def make_pools(*, caching: bool) -> dict[str, Any]:
    """Return vLLM's pool and ours, equally large."""
    from vllm.v1.core.block_pool import BlockPool

    from kvcached_vllm.block_pool import ElasticBlockPool

    num_blocks = NUM_PAGES * GEOMETRY.blocks_per_page
    return {
        "vanilla": BlockPool(num_blocks, caching, 16),
        "kvcached": ElasticBlockPool(GEOMETRY, Unlimited(), num_blocks, caching, 16, options={}),
    }


def one_block(pool: Any, rounds: int) -> float:
    """Return seconds per pair of get_new_blocks(1) and free_blocks."""
    start = CLOCK()
    for _ in range(rounds):
        pool.free_blocks(pool.get_new_blocks(1))
    return (CLOCK() - start) / rounds


def one_request(pool: Any, rounds: int) -> float:
    """Return seconds per request that takes 64 blocks at once, then 16 singly, and frees them."""
    start = CLOCK()
    for _ in range(rounds // 64):
        blocks = pool.get_new_blocks(64)
        for _ in range(16):
            blocks.extend(pool.get_new_blocks(1))
        pool.free_blocks(reversed(blocks))
    return (CLOCK() - start) / (rounds // 64)


def many_requests(pool: Any, rounds: int) -> float:
    """Return seconds per block while 64 requests decode, one finishing and one starting a turn."""
    live = [pool.get_new_blocks(20 + index % 7) for index in range(64)]
    start = CLOCK()
    for turn in range(rounds // 64):
        for blocks in live:
            blocks.extend(pool.get_new_blocks(1))
        pool.free_blocks(reversed(live[turn % 64]))
        live[turn % 64] = pool.get_new_blocks(20)
    seconds = CLOCK() - start
    for blocks in live:
        pool.free_blocks(blocks)
    return seconds / rounds


def fill_cache(pool: Any, num_blocks: int) -> None:
    """Leave so many blocks of a request in the prefix cache."""
    from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

    blocks = pool.get_new_blocks(num_blocks)
    for block in blocks:
        name = BlockHash(time.perf_counter_ns().to_bytes(16) + block.block_id.to_bytes(16))
        block_hash = make_block_hash_with_group_id(name, 0)
        block.set_block_hash(block_hash)
        pool.cached_block_hash_to_block.insert(block_hash, block)
    pool.free_blocks(reversed(blocks))


def end_schedule(pool: Any) -> None:
    """Do what happens in a pool of ours at the end of each schedule."""
    if hasattr(pool.pages, "drain"):  # up to 0.1, which scheduler_path.py measures as well
        pool.pages.drain()
        return
    is_live = pool.num_used_blocks > 0
    pool.pages.end_schedule(is_live=is_live)
    pool.pages.book.take_orders(pool.pages.count_pages, is_live=is_live)


def evict(pool: Any, num_pages: int) -> None:
    """Evict the oldest cached blocks: for a request, or with us together with their pages."""
    if hasattr(pool, "release_pages"):  # up to 0.1
        pool.release_pages(num_pages)
    elif hasattr(pool, "pages"):
        pool.evict_pages(num_pages - pool.pages.close_empty(num_pages))
        pool.pages.close_empty(num_pages)
    else:
        pool.free_blocks(pool.get_new_blocks(num_pages * GEOMETRY.blocks_per_page))


def one_eighth_of_a_cache(pool: Any, rounds: int) -> float:
    """Return seconds per block to evict an eighth of a full prefix cache."""
    num_blocks = (NUM_PAGES - 1) * GEOMETRY.blocks_per_page
    seconds = 0.0
    num_rounds = max(rounds // 4096, 1)
    for _ in range(num_rounds):
        pool.reset_prefix_cache()
        for _ in range(num_blocks // 64):
            fill_cache(pool, 64)
        if hasattr(pool, "pages"):
            end_schedule(pool)
        start = CLOCK()
        evict(pool, NUM_PAGES // 8)
        seconds += CLOCK() - start
    pool.reset_prefix_cache()
    return seconds / num_rounds / (NUM_PAGES // 8 * GEOMETRY.blocks_per_page)


CASES: dict[str, Callable[[Any, int], float]] = {
    "get_new_blocks(1) + free_blocks": one_block,
    "one request of 80 blocks": one_request,
    "64 decoding requests, per block": many_requests,
}
CACHING_CASES = {"an eighth of a full cache evicted, per block": one_eighth_of_a_cache}


def main() -> None:
    """Measure in turn and print medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20000)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    results = []
    for caching in (False, True):
        pools = make_pools(caching=caching)
        cases = CASES | CACHING_CASES if caching else CASES
        for case, measure in cases.items():
            seconds: dict[str, list[float]] = {name: [] for name in pools}
            for _ in range(options.pairs):
                for name, pool in pools.items():
                    seconds[name].append(measure(pool, options.rounds))
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            ratio = medians["kvcached"] / medians["vanilla"]
            pairs = zip(seconds["kvcached"], seconds["vanilla"], strict=True)
            results.append(
                {"case": case, "caching": caching, "seconds": medians, "ratio": ratio}
                | {"ratios": [own / base for own, base in pairs]}
            )
            print(
                f"{case:44} caching={caching!s:5} vanilla {medians['vanilla'] * 1e6:8.3f} us  "
                f"kvcached {medians['kvcached'] * 1e6:8.3f} us  ratio {ratio:.2f}"
            )
    if options.json:
        report = {"machine": describe_machine(), "results": results}
        write(options.json, report)


if __name__ == "__main__":
    main()
