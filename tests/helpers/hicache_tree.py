"""Run as a script: SGLang's own tree, controller and host pool over our pages, and no server.

Arguments: a JSON object with `policy`, `seed`, `num_turns`, and `defect`. Requests come and end,
neighbours take memory while copies are open, and what is found is compared with what was written.
A copy of an unmapped page ends the process.
"""

import json
import os
import random
import sys
import tempfile
from array import array
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed

from helpers.hicache_copier import install
from helpers.hicache_copier_settings import DEFECT, DELAY_MS, REPORT, SEED

NUM_PROMPTS, MAX_TOKENS = 6, 200
ARGUMENTS: dict[str, Any] = {
    "device": "cpu",
    "enable_hierarchical_cache": True,
    "hicache_ratio": 2.0,
    "hicache_size": 1,
    "hicache_mem_layout": "layer_first",
    "hicache_io_backend": "kernel",
    "hicache_storage_backend": None,
    "served_model_name": "m",
}
OLDER: dict[str, Any] = {
    "hicache_storage_backend_extra_config": None,
    "hicache_storage_prefetch_policy": "best_effort",
    "extra_metric_labels": None,
}


def marks_of(tokens: list[int]) -> torch.Tensor:
    """Return a number for each token that depends on all tokens up to it."""
    marks, mark = [], 1
    for token in tokens:
        mark = (mark * 31 + token + 7) % 1_000_003
        marks.append(mark)
    return torch.tensor(marks, dtype=torch.float32)


class Tree:
    """The tree, and requests to it.

    Args:
        folder: Where the ledger is.
        policy: When SGLang copies.
        undo: What is left at the end.
    """

    def __init__(self, folder: Path, policy: str, undo: ExitStack) -> None:
        from sglang.srt.managers.cache_controller import HiCacheController
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams

        from helpers.sglang_elastic import hooked, let_schedule, make_allocator, make_engine
        from kvcached_core.units import MIB
        from kvcached_sglang import transfer_hooks
        from kvcached_sglang.open_copies import OpenCopies

        arguments = ARGUMENTS | {"hicache_write_policy": policy}
        from sglang.srt import runtime_context

        context = runtime_context.get_context()
        if hasattr(context, "override_server_args"):
            undo.enter_context(publishing(context.override_server_args(**arguments)))
        else:  # older releases hand their arguments on
            arguments |= OLDER
        self.engine = make_engine(
            folder, host_pool=64 * MIB, page_bytes=2 * MIB, min_spare_pages=0, max_spare_pages=0
        )
        self.allocator = make_allocator(self.engine, 3000)
        self.pool = self.allocator.get_kvcache()
        self.engine.copies = self.engine.port.copies = OpenCopies(self.engine, None)
        names = ("start_writing", "start_loading")
        hooks = [(HiCacheController, name, getattr(transfer_hooks, name)) for name in names]
        hooks.append((HiCacheController, "reset", transfer_hooks.controller_reset))
        undo.enter_context(hooked(self.engine, *hooks))
        HiCacheController.move_indices = lambda _self, host, device: (host, device)
        params: Any = CacheInitParams(
            disable=False,
            req_to_token_pool=SimpleNamespace(),
            token_to_kv_pool_allocator=self.allocator,
            page_size=1,
        )
        params.tp_cache_group = distributed.group.WORLD
        self.cache = make_cache(params, SimpleNamespace(**arguments, file_storage_path=None))
        let_schedule(self.engine, self.cache)

    def ask(self, tokens: list[int]) -> int:
        """Find, load, check and add what a request has; return how many tokens were loaded."""
        from sglang.srt.mem_cache.base_prefix_cache import (
            EvictParams,
            InitLoadBackParams,
            InsertParams,
            MatchPrefixParams,
        )
        from sglang.srt.mem_cache.radix_cache import RadixKey

        from helpers.sglang_elastic import tell

        cache, key = self.cache, RadixKey(array("q", tokens), None)
        self._look()
        # As a schedule does for a request: newer releases load only into what is there already.
        self.engine.pools[0].promise_blocks(len(tokens), is_urgent=True)
        found = cache.match_prefix(MatchPrefixParams(key=key))
        node, num_host = found.last_device_node, found.host_hit_length
        if num_host:
            request = SimpleNamespace(
                rid="r",
                last_node=node,
                swa_host_hit_length=0,
                mamba_host_hit_length=0,
                kv=SimpleNamespace(mamba_pool_idx=None),
            )
            wanted: dict[str, Any] = {
                "best_match_node": found.best_match_node,
                "host_hit_length": num_host,
            }
            if "req" in InitLoadBackParams.__dataclass_fields__:
                wanted["req"] = request
            loaded, node = cache.init_load_back(InitLoadBackParams(**wanted))
            cache.ready_to_load_host_cache()
            for each in cache.cache_controller.ack_load_queue:
                each.finish_event.synchronize()  # as a layer that is computed waits
        if hasattr(found, "device_indices"):
            ids = found.device_indices
            if num_host and not isinstance(loaded, int):
                ids = torch.cat([ids, loaded])
        else:
            ids = cache.path_device_indices(node)
        lock = cache.inc_lock_ref(node)
        self._check(ids, tokens)
        num_kept = len(ids)
        missing = len(tokens) - num_kept
        if missing:
            short = missing - self.allocator.available_size()
            if short > 0:
                cache.evict(EvictParams(num_tokens=short))
            fresh = self.allocator.alloc(missing)
            tell(self.engine)
            for number, plane in enumerate(self._planes()):
                plane[fresh] = (marks_of(tokens)[num_kept:] + number)[:, None, None]
            ids = torch.cat([ids, fresh])
        # Ids behind what the tree has already would be freed as a second copy's.
        cache.insert(InsertParams(key=key, value=ids, prev_prefix_len=num_kept))
        params = lock.to_dec_params() if hasattr(lock, "to_dec_params") else None
        cache.dec_lock_ref(node, *(() if params is None else (params,)))
        return int(num_host)

    def give(self, num_pages: int, num_owed: int) -> None:
        """Let a neighbour ask."""
        from helpers.sglang_elastic import tell
        from kvcached_core.engine.ranks import WantedPages

        self.engine.giving.give(WantedPages(num_pages, num_owed))
        self.engine.giving.owed_pages = 0
        tell(self.engine)

    def _look(self) -> None:
        self.cache.check_hicache_events()
        assert self.engine.copies is not None
        self.engine.copies.settle()

    def _check(self, ids: torch.Tensor, tokens: list[int]) -> None:
        free = torch.cat([self.allocator.free_pages, self.allocator.release_pages])
        assert len(free) == len(free.unique()), "blocks that are free twice"
        expected = marks_of(tokens)[: len(ids)]
        for number, plane in enumerate(self._planes()):
            assert torch.equal(plane[ids, 0, 0], expected + number), "other tokens' bytes"

    def _planes(self) -> list[torch.Tensor]:
        return [*self.pool.k_buffer, *self.pool.v_buffer]


def publishing(override: Any) -> Any:
    """Return a context in which SGLang's arguments are published."""
    stack = ExitStack()
    override.install()
    stack.callback(override.restore)
    return stack


def make_cache(params: Any, arguments: Any) -> Any:
    """Return SGLang's cache with a host tier."""
    try:
        from sglang.srt.mem_cache.hiradix_cache import HiRadixCache
    except ImportError:
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        params.tree_components = (ComponentType.FULL,)
        cache = UnifiedRadixCache(params)
        cache.init_hicache(arguments, params)
        return cache
    return HiRadixCache(params, arguments)


def main() -> None:
    """Ask, give, report."""
    options = json.loads(sys.argv[1])
    folder = Path(tempfile.mkdtemp())
    os.environ |= {DELAY_MS: "5,20", SEED: str(options["seed"]), REPORT: str(folder / "copied")}
    if defect := options.get("defect"):
        os.environ[DEFECT] = defect
    install()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    source = random.Random(options["seed"])
    prompts = [
        [source.randrange(1000) for _ in range(source.randrange(50, MAX_TOKENS))]
        for _ in range(NUM_PROMPTS)
    ]
    num_open = 0
    with ExitStack() as undo:
        tree = Tree(folder, options["policy"], undo)
        for _ in range(options["num_turns"]):
            prompt = source.choice(prompts)
            tree.ask(prompt[: source.randrange(20, len(prompt) + 1)])
            num_open += bool(tree.engine.copies)
            chance = source.random()
            if chance < 0.5:
                tree.give(source.randrange(1, 30), 2 * source.randrange(2))
            elif chance < 0.55:
                tree.engine.empty()
        tree.engine.port.end_copies()
        tree.engine.empty()
        report = json.loads((folder / "copied").read_text())
        report["num_open_pages"] = tree.engine.pools[0].num_open_pages
        report["num_holders"] = tree.engine.holds.num_holders
    print("\n" + json.dumps(report | {"num_turns_with_open_copies": num_open}), flush=True)
    os._exit(0)  # the threads that copy go with it


if __name__ == "__main__":
    main()
