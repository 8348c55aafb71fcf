"""The arithmetic of planes, pages and sparse ids, for any shape."""

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvcached_core.errors import GeometryError
from kvcached_core.memory.geometry import (
    MAX_WASTE,
    Geometry,
    choose_geometry,
    fit_geometry,
)
from kvcached_core.units import MIB

GRANULARITY = 2 * MIB

shapes = st.tuples(
    st.sampled_from([2**8, 18432, 576, 65536, 2**20, 3 * 2**12, 1000, 98304]), st.integers(1, 130)
)


def choose(shape: tuple[int, int], target_page_bytes: int = 16 * MIB) -> Geometry:
    return choose_geometry(
        block_bytes=shape[0],
        num_planes=shape[1],
        granularity_bytes=GRANULARITY,
        target_page_bytes=target_page_bytes,
    )


@given(shapes, st.sampled_from([2 * MIB, 16 * MIB, 64 * MIB]))
def test_page_is_a_multiple_of_the_granularity_and_holds_its_planes(
    shape: tuple[int, int], target: int
) -> None:
    geometry = choose(shape, target)
    assert geometry.page_bytes % GRANULARITY == 0
    assert geometry.blocks_per_page >= 1
    assert geometry.num_planes * geometry.run_bytes <= geometry.page_bytes
    assert geometry.waste < MAX_WASTE


@given(shapes, st.integers(1, 5), st.data())
def test_every_block_lies_in_one_page_and_one_run(
    shape: tuple[int, int], num_pages: int, data: st.DataObject
) -> None:
    geometry = choose(shape)
    block = data.draw(st.integers(0, num_pages * geometry.blocks_per_page - 1))
    plane = data.draw(st.integers(0, geometry.num_planes - 1))
    block_id = geometry.block_id(block)
    page = geometry.page_of(block_id)
    start = geometry.block_offset(plane, block_id)
    run_start = page * geometry.page_bytes + plane * geometry.run_bytes
    assert geometry.exists(block_id)
    assert block_id < geometry.num_ids(num_pages)
    assert run_start <= start
    assert start + geometry.block_bytes <= run_start + geometry.run_bytes
    assert start + geometry.block_bytes <= (page + 1) * geometry.page_bytes


@given(
    st.integers(1, 7).map(lambda n: n * 64),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([64, 256, 1024]),
)
def test_no_two_blocks_of_any_planes_share_a_byte(
    block_bytes: int, num_planes: int, num_pages: int, granularity: int
) -> None:
    geometry = choose_geometry(
        block_bytes=block_bytes,
        num_planes=num_planes,
        granularity_bytes=granularity,
        target_page_bytes=4096,
    )
    assume(num_pages * geometry.blocks_per_page * num_planes < 3000)
    spans = sorted(
        (start := geometry.block_offset(plane, geometry.block_id(block)), start + block_bytes)
        for block in range(num_pages * geometry.blocks_per_page)
        for plane in range(num_planes)
    )
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= num_pages * geometry.page_bytes


@given(shapes, st.integers(0, 10_000))
def test_an_id_in_a_gap_reaches_only_the_pages_it_names(
    shape: tuple[int, int], block_id: int
) -> None:
    geometry = choose(shape)
    pages = geometry.pages_touched(block_id)
    for plane in range(geometry.num_planes):
        start = geometry.block_offset(plane, block_id)
        assert start // geometry.page_bytes in pages
        assert (start + geometry.block_bytes - 1) // geometry.page_bytes in pages


@given(shapes, st.integers(1, 6))
def test_every_plane_ends_inside_the_reservation(shape: tuple[int, int], num_pages: int) -> None:
    geometry = choose(shape)
    for plane in range(geometry.num_planes):
        end = geometry.plane_offset(plane) + geometry.num_ids(num_pages) * geometry.block_bytes
        assert end <= num_pages * geometry.page_bytes


@given(shapes, st.integers(-10_000, -1))
def test_no_negative_id_exists(shape: tuple[int, int], block_id: int) -> None:
    assert not choose(shape).exists(block_id)


@given(shapes, st.integers(1, 64))
def test_a_page_is_not_far_from_the_target_unless_its_blocks_are(
    shape: tuple[int, int], target_mib: int
) -> None:
    geometry = choose(shape, target_mib * MIB)
    smallest = choose(shape, 1)
    assert geometry.page_bytes >= target_mib * MIB // 2
    assert geometry.page_bytes <= max(2 * target_mib * MIB, 2 * smallest.page_bytes)


def test_llama_8b_has_pages_of_128_tokens() -> None:
    assert choose((65536, 32)) == Geometry(65536, 32, ids_per_page=256, blocks_per_page=8)


def test_mla_takes_the_smallest_page_that_wastes_under_three_percent() -> None:
    geometry = choose((18432, 61))
    assert (geometry.ids_per_page, geometry.blocks_per_page) == (2048, 33)
    assert geometry.waste == pytest.approx(0.017, abs=1e-3)


def test_ids_of_32_bits_are_refused_with_the_numbers() -> None:
    geometry = choose((65536, 32))
    geometry.check_ids(2**31 // 256)
    with pytest.raises(GeometryError, match="2147483648"):
        geometry.check_ids(2**31 // 256 + 1)


@pytest.mark.parametrize("name", ["block_bytes", "num_planes", "granularity_bytes"])
def test_sizes_that_are_not_positive_are_refused_by_name(name: str) -> None:
    arguments = {"block_bytes": 1, "num_planes": 1, "granularity_bytes": 1, name: 0}
    with pytest.raises(GeometryError, match=f"{name}=0"):
        choose_geometry(**arguments)


@given(shapes, st.integers(1, 130))
def test_a_second_pool_of_blocks_of_one_size_fits_the_pages_of_the_first_or_is_refused(
    shape: tuple[int, int], num_planes: int
) -> None:
    first = choose(shape)
    sizes = {"block_bytes": shape[0], "num_planes": num_planes, "page_bytes": first.page_bytes}
    num_left = first.ids_per_page % num_planes
    if first.ids_per_page < num_planes or num_left >= MAX_WASTE * first.ids_per_page:
        with pytest.raises(GeometryError, match=f"do not fit {num_planes} planes"):
            fit_geometry(**sizes)
    else:
        second = fit_geometry(**sizes)
        assert second.page_bytes == first.page_bytes
        assert second.waste < MAX_WASTE


def test_a_second_pool_whose_blocks_do_not_divide_a_page_is_refused() -> None:
    with pytest.raises(GeometryError, match="a block has to divide a page"):
        fit_geometry(block_bytes=1536, num_planes=2, page_bytes=16 * MIB)
