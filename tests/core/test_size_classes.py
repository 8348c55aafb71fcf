"""Several block sizes in one pool: the arithmetic, for any sizes."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.errors import GeometryError
from kvcached_core.memory.geometry import MAX_WASTE, Geometry, choose_geometry
from kvcached_core.memory.size_classes import MixedGeometry, SizeClass, choose_any
from kvcached_core.units import GIB, MIB

GRANULARITY = 2 * MIB
# The latents and the index of DeepSeek-V3.2 with blocks of 64 tokens, in 61 layers.
SPARSE = (SizeClass(73728, 61), SizeClass(8448, 61))


def mixed(classes: tuple[SizeClass, ...], granularity: int, target: int) -> MixedGeometry:
    geometry = choose_any(classes, granularity_bytes=granularity, target_page_bytes=target)
    assert isinstance(geometry, MixedGeometry)
    return geometry


def several(
    *, block_bytes: st.SearchStrategy[int], num_planes: int
) -> st.SearchStrategy[tuple[SizeClass, ...]]:
    one = st.builds(SizeClass, block_bytes, st.integers(1, num_planes))
    lists = st.lists(one, min_size=2, max_size=4, unique_by=lambda each: each.block_bytes)
    return lists.map(tuple)


shapes = several(
    block_bytes=st.sampled_from([2**8, 18432, 576, 8448, 65536, 2**20, 3 * 2**12, 1000, 73728]),
    num_planes=90,
)
small_shapes = several(block_bytes=st.integers(1, 9).map(lambda number: number * 32), num_planes=5)


@given(shapes, st.sampled_from([4096, GRANULARITY]), st.sampled_from([2 * MIB, 16 * MIB, 64 * MIB]))
def test_handles_are_whole_and_hold_the_runs_of_their_class(
    classes: tuple[SizeClass, ...], granularity: int, target: int
) -> None:
    geometry = mixed(classes, granularity, target)
    assert geometry.page_bytes == sum(geometry.handle_bytes)
    assert 0 <= geometry.waste < MAX_WASTE
    assert geometry.blocks_per_page >= 1
    for each, handle_bytes in zip(geometry.classes, geometry.handle_bytes, strict=True):
        used_bytes = each.num_planes * each.run_bytes
        assert handle_bytes % granularity == each.page_bytes % granularity == 0
        assert used_bytes <= handle_bytes < used_bytes + granularity
        assert handle_bytes <= each.page_bytes
        assert each.ids_per_page == geometry.ids_per_page
        assert each.blocks_per_page == geometry.blocks_per_page


@given(small_shapes, st.sampled_from([64, 256, 1024]), st.integers(1, 3))
def test_no_two_blocks_of_any_plane_and_class_share_a_byte_and_all_lie_in_their_pages_handles(
    classes: tuple[SizeClass, ...], granularity: int, num_pages: int
) -> None:
    geometry = mixed(classes, granularity, 4096)
    blocks, handles = [], []
    for number, each in enumerate(geometry.classes):
        base = geometry.class_offset(number, num_pages)
        starts = [base + page * each.page_bytes for page in range(num_pages)]
        handles += [(start, start + geometry.handle_bytes[number]) for start in starts]
        for plane, block in itertools.product(
            range(each.num_planes), range(num_pages * geometry.blocks_per_page)
        ):
            block_id = geometry.block_id(block)
            start = base + each.block_offset(plane, block_id)
            begin, end = handles[number * num_pages + geometry.page_of(block_id)]
            assert begin <= start
            assert start + each.block_bytes <= end
            blocks.append((start, start + each.block_bytes))
    for spans in (sorted(blocks), handles):
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert handles[-1][1] <= geometry.reserved_bytes(num_pages)


@given(shapes, st.integers(1, 6))
def test_every_plane_ends_inside_the_range_of_its_class(
    classes: tuple[SizeClass, ...], num_pages: int
) -> None:
    geometry = mixed(classes, GRANULARITY, 16 * MIB)
    for each in geometry.classes:
        for plane in range(each.num_planes):
            end = each.plane_offset(plane) + each.num_ids(num_pages) * each.block_bytes
            assert end <= each.reserved_bytes(num_pages)


@given(st.sampled_from([18432, 65536, 1000]), st.integers(2, 90))
def test_one_class_is_laid_out_as_ever(block_bytes: int, num_planes: int) -> None:
    alone = choose_any([SizeClass(block_bytes, num_planes)], granularity_bytes=GRANULARITY)
    assert type(alone) is Geometry
    assert alone == choose_geometry(
        block_bytes=block_bytes, num_planes=num_planes, granularity_bytes=GRANULARITY
    )
    assert alone.classes == (alone,)
    assert alone.maps_gaps
    assert alone.class_offset(0, 7) == 0
    assert alone.reserved_bytes(7) == 7 * alone.page_bytes


def test_sizes_that_fill_their_handles_waste_nothing_near_the_target() -> None:
    geometry = mixed((SizeClass(65536, 24), SizeClass(32768, 8)), GRANULARITY, 16 * MIB)
    assert geometry.waste == 0
    assert geometry.handle_bytes == (12 * MIB, 2 * MIB)
    assert (geometry.blocks_per_page, geometry.ids_per_page) == (8, 192)


def test_sparse_attention_needs_no_padding_and_no_larger_pages() -> None:
    geometry = mixed(SPARSE, GRANULARITY, 16 * MIB)
    assert geometry.page_bytes == 54 * MIB
    assert geometry.ids_per_page == 8192  # what an index of 8,448 bytes needs
    geometry.check_ids(8 * 141 * GIB // geometry.page_bytes)


def test_a_rank_with_fewer_planes_has_pages_of_the_same_size() -> None:
    geometry = mixed(SPARSE, GRANULARITY, 16 * MIB)
    fewer = replace(geometry, num_planes=30)
    assert fewer.page_bytes == geometry.page_bytes
    assert fewer.reserved_bytes(5) == geometry.reserved_bytes(5)
    assert fewer.classes[0].run_bytes == geometry.classes[0].run_bytes


@pytest.mark.parametrize(
    ("classes", "granularity"),
    [
        ((), GRANULARITY),
        ((SizeClass(0, 4), SizeClass(64, 4)), GRANULARITY),
        ((SizeClass(64, 4), SizeClass(128, -1)), GRANULARITY),
        ((SizeClass(64, 4), SizeClass(128, 1)), 0),
    ],
)
def test_what_is_not_positive_is_refused(classes: tuple[SizeClass, ...], granularity: int) -> None:
    with pytest.raises(GeometryError, match="must be positive"):
        choose_any(classes, granularity_bytes=granularity)
