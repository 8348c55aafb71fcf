"""How many surplus pages nobody needed for long enough that they may go."""

from collections import deque
from collections.abc import Callable


class Lingering:
    """The least number of surplus pages over a sliding window of time.

    Pages that are surplus now may be wanted by the next request. Those that were surplus all the
    time for `idle_seconds` were needed by nobody for that long, whichever pages they were.

    The scheduler's thread calls it.

    Args:
        idle_seconds: The length of the window.
        clock: Returns seconds.
    """

    def __init__(self, idle_seconds: float, clock: Callable[[], float]) -> None:
        self._idle_seconds = idle_seconds
        self._clock = clock
        # (since, number): from `since` on, until the next entry's, no number was below this one.
        # Both ascend. Before the first entry it was 0.
        self.least: deque[tuple[float, int]] = deque()

    def note(self, num_surplus: int) -> None:
        """Say how many pages are surplus from now on."""
        least = self.least
        if not num_surplus:
            least.clear()
            return
        since = None
        while least and least[-1][1] >= num_surplus:
            since = least.pop()[0]
        least.append((self._clock() if since is None else since, num_surplus))

    def num_due(self) -> int:
        """Return how many pages were surplus all the time for `idle_seconds`."""
        least = self.least
        if not least:
            return 0
        latest = self._clock() - self._idle_seconds
        while len(least) > 1 and least[1][0] <= latest:
            least.popleft()
        since, number = least[0]
        return number if since <= latest else 0

    def seconds_until_due(self) -> float | None:
        """Return when all pages that are surplus now are due, or None if there are none."""
        if not self.least:
            return None
        return max(self.least[-1][0] + self._idle_seconds - self._clock(), 0.0)

    def restart(self) -> None:
        """Forget what was noted: what is surplus lingers once more."""
        self.least.clear()
