"""Scales beside each token's head: vLLM's own function over pages of which one is mapped."""

import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.forked import exit_code_of_child

from kvcached_core.memory.mixed_arena import make_arena
from kvcached_core.memory.size_classes import SizeClass, choose_any
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import MIB
from kvcached_vllm.inline_scales import VIEWS, ensure_scale_caches, mark_layers

pytestmark = [pytest.mark.vllm, pytest.mark.older_release]

NUM_PAGES, NUM_LAYERS = 4, 6
NUM_HEADS, BLOCK_TOKENS, HEAD_BYTES, SCALE_BYTES = 4, 16, 32, 4
HALF_BYTES = HEAD_BYTES + SCALE_BYTES
CONTENT_BYTES = 2 * HALF_BYTES  # a key with its scale, and a value with its own
BLOCK_BYTES = NUM_HEADS * BLOCK_TOKENS * CONTENT_BYTES
# The bytes of the blocks of a plane that lie apart, and of one in which all layers of a block lie.
STRIDES = {"apart": BLOCK_BYTES, "side by side": NUM_LAYERS * BLOCK_BYTES}


@pytest.fixture(params=STRIDES)
def arena(request: pytest.FixtureRequest) -> Iterator[Any]:
    planes = SizeClass(STRIDES[request.param], BLOCK_BYTES * NUM_LAYERS // STRIDES[request.param])
    geometry = choose_any([planes], granularity_bytes=2 * MIB, target_page_bytes=4 * MIB)
    made = make_arena(HostBackend(), geometry, NUM_PAGES)
    made.map([0])
    yield made
    made.close()


def cache_of(arena: Any) -> torch.Tensor:
    """Return the second layer's blocks as vLLM has them, with heads outermost."""
    stride = arena.geometry.block_bytes
    second = arena.geometry.plane_offset(1) if stride == BLOCK_BYTES else BLOCK_BYTES
    return arena.tensor().as_strided(
        (arena.geometry.num_ids(NUM_PAGES), NUM_HEADS, BLOCK_TOKENS, CONTENT_BYTES),
        (stride, BLOCK_TOKENS * CONTENT_BYTES, CONTENT_BYTES, 1),
        second,
    )


def attention(arena: Any) -> Any:
    """Return a layer's attention of vLLM's that has been told of our pages."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    made = TritonAttentionImpl.__new__(TritonAttentionImpl)
    layers = {"ours": SimpleNamespace(impl=made), "another": SimpleNamespace()}
    context = SimpleNamespace(static_forward_context=layers)
    mark_layers(SimpleNamespace(vllm_config=SimpleNamespace(compilation_config=context)), arena)
    return made


def originally() -> Any:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    return TritonAttentionImpl._ensure_scale_caches


def test_only_the_scales_of_the_null_block_are_filled(arena: Any) -> None:
    cache = cache_of(arena)
    layer = attention(arena)
    before = arena.tensor()[: arena.geometry.page_bytes].clone()
    ensure_scale_caches(originally())(layer, cache)  # what is not mapped would end the process
    assert not before.any()
    assert all(bool((getattr(layer, name)[0] == 1.0).all()) for name in VIEWS)
    assert arena.tensor()[: arena.geometry.page_bytes].count_nonzero() == 2 * (
        2 * NUM_HEADS * BLOCK_TOKENS  # two bytes of a 1.0 in four are not zero
    )
    assert list(arena.resident_pages) == [0]


def test_without_the_hook_the_process_ends(arena: Any) -> None:
    cache = cache_of(arena)
    layer = attention(arena)
    assert exit_code_of_child(lambda: originally()(layer, cache)) == -signal.SIGSEGV


def test_scales_of_each_block_lie_behind_its_keys_and_values(arena: Any) -> None:
    cache = cache_of(arena)
    layer = attention(arena)
    wrapped = ensure_scale_caches(originally())
    wrapped(layer, cache)
    views = [getattr(layer, name) for name in VIEWS]
    wrapped(layer, cache)  # as before each step
    assert [getattr(layer, name) is view for name, view in zip(VIEWS, views, strict=True)]
    arena.map([NUM_PAGES - 1])
    last = arena.geometry.block_id(NUM_PAGES * arena.geometry.blocks_per_page - 1)
    for view, start in zip(views, (HEAD_BYTES, HALF_BYTES + HEAD_BYTES), strict=True):
        assert view.shape == (cache.shape[0], BLOCK_TOKENS, NUM_HEADS)
        assert not view[last].any()  # a page comes with zeros, which nobody reads, either
        view[last, 5, 3] = 0.25
        written = cache[last, 3, 5, start : start + SCALE_BYTES]
        assert written.contiguous().view(torch.float32).item() == 0.25
    assert cache[last].count_nonzero() == 2 * 2


def test_they_are_the_views_that_vllm_makes_of_a_cache_of_its_own(arena: Any) -> None:
    cache = cache_of(arena)
    layer, vanillas = attention(arena), attention(arena)
    arena.map(range(1, NUM_PAGES))
    originally()(vanillas, cache[: arena.geometry.blocks_per_page])
    ensure_scale_caches(originally())(layer, cache)
    for name in VIEWS:
        ours, theirs = getattr(layer, name), getattr(vanillas, name)
        assert ours.stride() == theirs.stride()
        assert ours.data_ptr() == theirs.data_ptr()
        assert ours.shape[1:] == theirs.shape[1:]


def test_an_engine_that_is_not_ours_fills_all_of_its_scales() -> None:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    layer = TritonAttentionImpl.__new__(TritonAttentionImpl)
    own = torch.zeros((3, NUM_HEADS, BLOCK_TOKENS, CONTENT_BYTES), dtype=torch.int8)
    ensure_scale_caches(originally())(layer, own)
    assert all(bool((getattr(layer, name) == 1.0).all()) for name in VIEWS)
