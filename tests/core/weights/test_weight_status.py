"""What several ranks have of their weights, as one."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.weights.status import WeightStatus, merge


@st.composite
def statuses(draw: st.DrawFn) -> WeightStatus:
    num_pages = draw(st.integers(1, 40))
    page_bytes = draw(st.sampled_from([1, 2, 4]))
    return WeightStatus(
        num_pages, draw(st.integers(0, num_pages)), page_bytes, is_copied=draw(st.booleans())
    )


@given(statuses())
def test_a_single_rank_is_what_it_says(status: WeightStatus) -> None:
    assert merge([status]) == status


@given(st.lists(statuses(), min_size=1, max_size=4))
def test_ranks_lack_what_the_one_lacks_that_lacks_most_and_are_copied_together(
    found: list[WeightStatus],
) -> None:
    merged = merge(found)
    assert merged.num_missing_pages == max(one.num_missing_pages for one in found)
    assert merged.is_copied == all(one.is_copied for one in found)
    missing_bytes = merged.num_missing_pages * merged.page_bytes
    assert all(one.num_missing_pages * one.page_bytes <= missing_bytes for one in found)
    assert 0 <= merged.num_resident_pages <= merged.num_pages


@given(st.lists(statuses(), min_size=1, max_size=4))
def test_what_each_rank_has_needs_and_lacks_stays_its_own(found: list[WeightStatus]) -> None:
    merged = merge(found)
    assert merged.needed_bytes == tuple(one.num_pages * one.page_bytes for one in found)
    assert merged.resident_bytes == tuple(one.num_resident_pages * one.page_bytes for one in found)
    assert merged.missing_bytes == tuple(one.num_missing_pages * one.page_bytes for one in found)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data())
def test_ranks_that_lack_their_last_pages_together_are_told_of_as_they_are(
    counts: list[int], data: st.DataObject
) -> None:
    whole = [WeightStatus(count, count, 1, is_copied=True) for count in counts]
    num_missing = data.draw(st.integers(0, max(counts)))
    merged = merge(
        [replace(one, num_resident_pages=one.pages_without(num_missing)) for one in whole]
    )
    assert merged.num_missing_pages == num_missing
    assert merged.resident_bytes == tuple(max(count - num_missing, 0) for count in counts)
