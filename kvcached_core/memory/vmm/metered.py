"""A layer that counts and times every call of the backend below."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from kvcached_core.memory.vmm.backend import Backend, Layer, Result


@dataclass
class CallStatistics:
    """What one verb did so far.

    Attributes:
        num_calls: Calls that returned.
        num_failures: Calls that raised.
        num_bytes: Bytes of the calls that returned.
        seconds: Time inside the backend, failures included.
    """

    num_calls: int = 0
    num_failures: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


@dataclass
class Statistics:
    """The statistics of each verb, and how many calls each thread made."""

    verbs: dict[str, CallStatistics] = field(default_factory=dict)
    threads: Counter[int] = field(default_factory=Counter)

    def num_calls_of_thread(self, identifier: int) -> int:
        """Return the calls of the thread with this `threading.get_ident`, failures included."""
        return self.threads[identifier]

    def of(self, verb: str) -> CallStatistics:
        """Return the statistics of `verb`, such as `map`."""
        return self.verbs.setdefault(verb, CallStatistics())

    @property
    def created_bytes(self) -> int:
        """Bytes created and not released."""
        return self.of("create").num_bytes - self.of("release").num_bytes


class MeteredBackend(Layer):
    """Counts calls, bytes and seconds in `statistics`."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.statistics = Statistics()

    def _call(
        self, verb: str, num_bytes: int, function: Callable[..., Result], *args: object
    ) -> Result:
        statistics = self.statistics.of(verb)
        self.statistics.threads[threading.get_ident()] += 1
        start = time.perf_counter()
        try:
            result = function(*args)
        except BaseException:
            statistics.num_failures += 1
            raise
        finally:
            statistics.seconds += time.perf_counter() - start
        statistics.num_calls += 1
        statistics.num_bytes += num_bytes
        return result
