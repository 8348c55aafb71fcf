"""How long an instance's maps and unmaps took, in buckets, as words of its row in the ledger."""

import threading
from bisect import bisect_left
from dataclasses import dataclass

# Up to how many seconds a call took that is in a bucket; what took longer is in one more.
BOUNDS_SECONDS = (0.0001, 0.0003, 0.001, 0.01, 0.1)

_BOUNDS_NS = tuple(round(seconds * 1e9) for seconds in BOUNDS_SECONDS)
_NUM_BUCKETS = len(BOUNDS_SECONDS) + 1
_PER_WORD = 2
_BITS = 31  # of a count in a word; one that is full begins again, as a new process's counter does
_MASK = (1 << _BITS) - 1


@dataclass(frozen=True)
class CallTimes:
    """Calls of one kind.

    Attributes:
        buckets: For each bucket the calls in it that returned.
        nanoseconds: What these calls took together.
        num_failures: Calls that raised.
    """

    buckets: tuple[int, ...] = (0,) * _NUM_BUCKETS
    nanoseconds: int = 0
    num_failures: int = 0

    @property
    def num_calls(self) -> int:
        """Calls that returned."""
        return sum(self.buckets)

    @property
    def seconds(self) -> float:
        """What they took together."""
        return self.nanoseconds / 1e9

    def __add__(self, other: "CallTimes") -> "CallTimes":
        return CallTimes(
            tuple(a + b for a, b in zip(self.buckets, other.buckets, strict=True)),
            self.nanoseconds + other.nanoseconds,
            self.num_failures + other.num_failures,
        )

    def write(self, words: memoryview) -> None:
        """Add it to what the words of a row say; the caller has the ledger's lock.

        Args:
            words: For two buckets each, for the nanoseconds, and for the failures.
        """
        for index, count in enumerate(self.buckets):
            if count:
                place, second = divmod(index, _PER_WORD)
                word, shift = words[place], second * _BITS
                whole = (word >> shift) + count & _MASK
                words[place] = word & ~(_MASK << shift) | whole << shift
        words[-2] += self.nanoseconds
        words[-1] += self.num_failures

    @classmethod
    def read(cls, words: memoryview) -> "CallTimes":
        """Return what the words of a row say; see `write`."""
        buckets = tuple(
            count for word in words[:-2] for count in (word & _MASK, word >> _BITS & _MASK)
        )
        return cls(buckets, words[-2], words[-1])


NO_CALLS = CallTimes()


class Meter:
    """Counts calls of one kind. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all, self._new = _Counts(), _Counts()
        self._is_new = False

    def count(self, nanoseconds: int) -> None:
        """Count a call that returned."""
        bucket = bisect_left(_BOUNDS_NS, nanoseconds)
        with self._lock:
            for counts in (self._all, self._new):
                counts.buckets[bucket] += 1
                counts.nanoseconds += nanoseconds
            self._is_new = True

    def count_failure(self) -> None:
        """Count a call that raised."""
        with self._lock:
            for counts in (self._all, self._new):
                counts.num_failures += 1
            self._is_new = True

    def times(self) -> CallTimes:
        """Return all calls so far."""
        with self._lock:
            return self._all.times()

    def take(self) -> CallTimes:
        """Return the calls since this was called last."""
        if not self._is_new:  # after each step: it has to cost next to nothing
            return NO_CALLS
        with self._lock:
            taken, self._new = self._new, _Counts()
            self._is_new = False
            return taken.times()


class _Counts:
    """Calls of one kind, while they are counted."""

    __slots__ = ("buckets", "nanoseconds", "num_failures")

    def __init__(self) -> None:
        self.buckets = [0] * _NUM_BUCKETS
        self.nanoseconds = self.num_failures = 0

    def times(self) -> CallTimes:
        return CallTimes(tuple(self.buckets), self.nanoseconds, self.num_failures)
