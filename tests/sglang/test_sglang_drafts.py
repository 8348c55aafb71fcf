"""A draft's layers lie in the target's pages, behind the target's own, or the start ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.sglang_elastic import hooked, make_engine, tell
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from kvcached_core.units import MIB
from kvcached_sglang import hooks, speculating
from kvcached_sglang.demand import demand_of, named_blocks, tokens_to_go_on
from kvcached_sglang.engine import SglangEngine

pytestmark = pytest.mark.sglang

PAGE_BYTES = 2 * MIB
NUM_TOKENS = 700
TARGET = {"layer_num": 2, "head_num": 2, "head_dim": 1024, "page_size": 1}


def make_pool(**shape: int) -> Any:
    return MHATokenToKVPool(
        size=NUM_TOKENS,
        dtype=torch.float32,
        device="cpu",
        enable_memory_saver=False,
        **TARGET | shape,
    )


def draft_runner(num_layers: int, head_dim: int) -> Any:
    """Return what is known of a draft before the target's pool is made."""
    return SimpleNamespace(
        num_effective_layers=num_layers,
        kv_cache_dtype=torch.float32,
        server_args=SimpleNamespace(tp_size=1),
        model_config=SimpleNamespace(
            attention_arch=SimpleNamespace(name="MHA"),
            head_dim=head_dim,
            get_num_kv_heads=lambda _: TARGET["head_num"],
        ),
    )


@contextmanager
def target(
    folder: Path, *num_draft_layers: int, head_dim: int = TARGET["head_dim"]
) -> Iterator[tuple[SglangEngine, Any]]:
    """Make a target's pool, and its allocator, where drafts of so many layers are known."""
    engine = make_engine(folder / "kv", host_pool=64 * MIB, page_bytes=PAGE_BYTES)
    for number in num_draft_layers:
        engine.drafts.add(draft_runner(number, head_dim))
    with hooked(
        engine,
        (MHATokenToKVPool, "_create_buffers", hooks.create_buffers),
        (TokenToKVPoolAllocator, "__init__", hooks.allocator_init),
    ):
        pool = make_pool()
        yield (
            engine,
            TokenToKVPoolAllocator(NUM_TOKENS, torch.float32, "cpu", pool, need_sort=False),
        )
    assert engine.memory is not None
    engine.memory.close()
    engine.close()


def planes(*pools: Any) -> list[torch.Tensor]:
    return [plane for pool in pools for plane in (*pool.k_buffer, *pool.v_buffer)]


def test_a_token_has_a_place_of_its_own_in_each_layer_of_target_and_drafts(tmp_path: Path) -> None:
    with target(tmp_path, 1, 2) as (engine, allocator):
        pool, drafts = allocator.get_kvcache(), [make_pool(layer_num=1), make_pool(layer_num=2)]
        geometry = pool.kvcached
        assert (geometry.num_planes, engine.placing.geometries) == (10, [geometry])
        assert {each.size for each in drafts} == {pool.size}
        ids = allocator.alloc(3 * geometry.blocks_per_page)
        tell(engine)
        all_planes = planes(pool, *drafts)
        for number, plane in enumerate(all_planes):
            plane[ids] = float(number)
        for number, plane in enumerate(all_planes):
            assert bool((plane[ids] == number).all())
        start = engine.memory.arena.address  # type: ignore[union-attr]
        offsets = sorted(plane.data_ptr() - start for plane in all_planes)
        assert offsets == [geometry.plane_offset(number) for number in range(10)]
        resident = engine.memory.arena.resident_pages  # type: ignore[union-attr]
        assert len(resident) == len(engine.pools[0].open_pages)
        for each in (pool, *drafts):
            each.k_buffer.clear()
            each.v_buffer.clear()
        all_planes.clear()
        del plane


def test_a_draft_of_other_bytes_a_token_has_planes_of_its_own_size_in_the_same_pages(
    tmp_path: Path,
) -> None:
    with target(tmp_path, 1, 2, head_dim=512) as (engine, allocator):
        pool = allocator.get_kvcache()
        drafts = [make_pool(layer_num=number, head_dim=512) for number in (1, 2)]
        geometry = pool.kvcached
        sizes = [(each.block_bytes, each.num_planes) for each in geometry.classes]
        assert sizes == [(8192, 4), (4096, 6)]
        ids = allocator.alloc(2 * geometry.blocks_per_page)
        tell(engine)
        all_planes = planes(pool, *drafts)
        for number, plane in enumerate(all_planes):
            plane[ids] = float(number)  # what is not mapped would end the process
        for number, plane in enumerate(all_planes):
            assert bool((plane[ids] == number).all())
        for each in (pool, *drafts):
            each.k_buffer.clear()
            each.v_buffer.clear()
        all_planes.clear()
        del plane


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"head_dim": 512}, r"bytes of a token in one layer are 4096, expected one of \[8192\]"),
        ({"page_size": 4}, "tokens of a block are 4, the target's 1"),
        ({"layer_num": 3}, "the draft's pool has 6 planes, expected at most 4"),
    ],
)
def test_a_draft_that_does_not_fit_the_pages_ends_the_start(
    tmp_path: Path, shape: dict[str, int], message: str
) -> None:
    with target(tmp_path, 2) as (_, allocator):
        with pytest.raises(SystemExit, match=f"{message}.*remove --speculative-algorithm"):
            make_pool(**shape)
        pool = allocator.get_kvcache()
        pool.k_buffer.clear()
        pool.v_buffer.clear()


class Batch(SimpleNamespace):
    """A batch of requests of one token each, of which a step reserves eight more."""

    reserved = 8

    def new_tokens_required_next_decode(self) -> int:
        return self.reserved * len(self.reqs)


def batch(num_requests: int, *, drafts: bool) -> Batch:
    requests = [SimpleNamespace(kv_allocated_len=9) for _ in range(num_requests)]
    return Batch(reqs=requests, spec_algorithm=SimpleNamespace(is_none=lambda: not drafts))


@pytest.mark.parametrize(("drafts", "num_blocks"), [(False, 5), (True, 10)])
def test_what_a_step_may_draft_is_promised(num_blocks: int, *, drafts: bool) -> None:
    part = SimpleNamespace(origin_input_ids=[7] * 100, output_ids=[], prefix_len=60)
    scheduler = SimpleNamespace(
        running_batch=batch(2, drafts=drafts),
        last_batch=batch(3, drafts=drafts),
        chunked_req=None,
        chunked_prefill_size=None,
        waiting_queue=[],
    )
    assert demand_of(scheduler, block_tokens=4, prefill_tokens=64).num_running == num_blocks
    scheduler.chunked_req = part
    num_running = {False: 2, True: 4}[drafts]
    assert tokens_to_go_on(scheduler, block_tokens=4) == 40 + (num_running + 1) * 4


@pytest.mark.parametrize("drafts", [False, True])
def test_the_check_of_a_batch_looks_at_what_its_drafts_may_write(*, drafts: bool) -> None:
    decoding = batch(1, drafts=drafts)
    decoding.seq_lens, decoding.req_pool_indices = torch.tensor([3]), torch.tensor([0])
    decoding.out_cache_loc = torch.tensor([40])
    decoding.forward_mode = SimpleNamespace(is_decode=lambda: True)
    table = SimpleNamespace(req_to_token=torch.arange(32)[None])
    named = named_blocks(SimpleNamespace(req_to_token_pool=table), decoding, 1).tolist()
    assert named == ([*range(9)] if drafts else [0, 1, 2, 40])


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ({}, []),
        ({"speculative_algorithm": "NGRAM"}, []),
        ({"speculative_algorithm": "eagle3"}, []),
        ({"speculative_algorithm": "DFLASH"}, ["speculative decoding by DFLASH"]),
    ],
)
def test_what_nobody_has_tried_is_refused(arguments: dict[str, Any], messages: list[str]) -> None:
    found = [*speculating.draft_obstacles(SimpleNamespace(**arguments))]
    assert [message.partition(":")[0] for message in found] == messages


def test_workers_that_take_ids_on_trial_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculating, "_TRYING_MODULE", speculating.__name__)
    (found,) = speculating.draft_obstacles(SimpleNamespace(speculative_algorithm="NGRAM"))
    assert "takes ids on trial" in found
