"""Two replays beside each other: how their windows are drawn again."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from multi_model.compared import FIGURES, _resampled

P99 = next(figure for figure in FIGURES.values() if figure.percent == 99)
# Some are alike, and those of real requests are not.
WINDOWS = st.lists(
    st.lists(st.floats(0.0, 1e5) | st.integers(0, 3).map(float), min_size=1, max_size=9),
    min_size=1,
    max_size=12,
)


@given(WINDOWS, st.data())
def test_a_percentile_of_windows_drawn_again_is_numpys(
    windows: list[list[float]], data: st.DataObject
) -> None:
    places = st.lists(st.integers(0, len(windows) - 1), min_size=3, max_size=3)
    drawn = np.array(data.draw(st.lists(places, min_size=1, max_size=3)))
    again = [np.concatenate([windows[place] for place in each]) for each in drawn]
    said = [np.percentile(values, 99) for values in again]
    assert list(_resampled(P99, windows, drawn)) == said
