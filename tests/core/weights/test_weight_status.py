"""What several ranks have of their weights, as one."""

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
