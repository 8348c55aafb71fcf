"""How often an instance's weights came back, and how long that took, as two words of its row."""

from bisect import bisect_left
from dataclasses import dataclass

# Up to how many seconds an activation took that is in a bucket; what took longer is in one more.
ACTIVATION_BOUNDS_SECONDS = (0.25, 0.5, 1.0)

_BOUNDS_NS = tuple(round(seconds * 1e9) for seconds in ACTIVATION_BOUNDS_SECONDS)
_NUM_BUCKETS = len(ACTIVATION_BOUNDS_SECONDS) + 1
# Of a count, three of which fill the first word; one that is full begins again, as a new process's
# counter does. The fourth leaves so many bits of the second word to the microseconds.
_BITS, _MICROSECOND_BITS = 21, 42
_MASK, _MICROSECOND_MASK = (1 << _BITS) - 1, (1 << _MICROSECOND_BITS) - 1


@dataclass(frozen=True)
class Activations:
    """The times that an instance woke.

    Attributes:
        buckets: For each bucket the activations in it.
        microseconds: What they took together.
    """

    buckets: tuple[int, ...] = (0,) * _NUM_BUCKETS
    microseconds: int = 0

    @property
    def num(self) -> int:
        """How many there were."""
        return sum(self.buckets)

    @property
    def seconds(self) -> float:
        """What they took together."""
        return self.microseconds / 1e6

    @classmethod
    def one(cls, nanoseconds: int) -> "Activations":
        """Return a single one that took so long."""
        found = bisect_left(_BOUNDS_NS, nanoseconds)
        buckets = tuple(int(number == found) for number in range(_NUM_BUCKETS))
        return cls(buckets, round(nanoseconds / 1e3))

    def __add__(self, other: "Activations") -> "Activations":
        return Activations(
            tuple(a + b for a, b in zip(self.buckets, other.buckets, strict=True)),
            self.microseconds + other.microseconds,
        )

    def write(self, words: memoryview) -> None:
        """Add it to what the words of a row say; the caller has the ledger's lock."""
        total = Activations.read(words) + self
        first, second, third, last = (count & _MASK for count in total.buckets)
        words[0] = third << 2 * _BITS | second << _BITS | first
        words[1] = last << _MICROSECOND_BITS | total.microseconds & _MICROSECOND_MASK

    @classmethod
    def read(cls, words: memoryview) -> "Activations":
        """Return what the words of a row say; see `write`."""
        counts, rest = words
        buckets = (
            *(counts >> number * _BITS & _MASK for number in range(_NUM_BUCKETS - 1)),
            rest >> _MICROSECOND_BITS & _MASK,
        )
        return cls(buckets, rest & _MICROSECOND_MASK)


NO_ACTIVATIONS = Activations()
