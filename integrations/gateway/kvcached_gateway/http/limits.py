"""What a client's key may take: so many requests at once, and so many a minute."""

from collections.abc import Callable
from dataclasses import dataclass

from kvcached_gateway.errors import RefusedError
from kvcached_gateway.http.front import KeyView
from kvcached_gateway.lease import Ask, Ending, Lease, Leases, WrappedLease

__all__ = ["LimitedLeases"]

MAX_TALLIES = 4096  # more keys than that are not remembered between their requests
SECONDS_A_MINUTE = 60.0


@dataclass
class _Tally:
    """What a key has here, and its bucket: it fills evenly, and each request takes one."""

    left: float
    filled_at: float
    num_here: int = 0

    def take(self, key: KeyView, now: float) -> None:
        """Count one request of the key.

        Raises:
            RefusedError: If it is one too many (429).
        """
        if key.max_concurrent is not None and self.num_here >= key.max_concurrent:
            raise RefusedError(
                429,
                "too_many_at_once",
                f"the key {key.name!r} has {self.num_here} requests here; it may have "
                f"{key.max_concurrent} at once",
                retry_after_seconds=1,
            )
        if key.requests_per_minute is not None:
            most = max(1.0, key.requests_per_minute)
            rate = key.requests_per_minute / SECONDS_A_MINUTE
            self.left = min(most, self.left + rate * (now - self.filled_at))
            self.filled_at = now
            if self.left < 1:
                raise RefusedError(
                    429,
                    "rate_limit_exceeded",
                    f"the key {key.name!r} may send {key.requests_per_minute:g} requests a minute",
                    retry_after_seconds=(1 - self.left) / rate,
                )
            self.left -= 1
        self.num_here += 1


class LimitedLeases:
    """Leases of a line, for keys that stay within their limits.

    It stands beside the line, in the controller's process, so the limits hold over all workers.

    Args:
        leases: The line.
        key: Finds a key by its name; None for one that is gone.
        clock: Monotonic seconds.
    """

    def __init__(
        self, leases: Leases, key: Callable[[str], KeyView | None], clock: Callable[[], float]
    ) -> None:
        self._leases = leases
        self._key = key
        self._clock = clock
        self._tallies: dict[str, _Tally] = {}

    async def take(self, ask: Ask) -> Lease:
        """Wait for a lease, as `Leases` says.

        Raises:
            RefusedError: If the key has too many requests here or sent too many (429), too.
        """
        key = None if ask.key is None else self._key(ask.key)
        if key is None or (key.max_concurrent is None and key.requests_per_minute is None):
            return await self._leases.take(ask)
        tally = self._tally(key)
        if ask.is_again:  # it was counted when it came
            tally.num_here += 1
        else:
            tally.take(key, self._clock())
        try:
            lease = await self._leases.take(ask)
        except BaseException:
            tally.num_here -= 1
            raise
        return _Counted(lease, tally)

    def _tally(self, key: KeyView) -> _Tally:
        tally = self._tallies.get(key.name)
        if tally is None:
            if len(self._tallies) >= MAX_TALLIES:
                self._tallies = {name: old for name, old in self._tallies.items() if old.num_here}
            tally = _Tally(max(1.0, key.requests_per_minute or 1.0), self._clock())
            self._tallies[key.name] = tally
        return tally


class _Counted(WrappedLease):
    """A lease that gives back its key's place with it."""

    def __init__(self, inner: Lease, tally: _Tally) -> None:
        super().__init__(inner)
        self._tally: _Tally | None = tally

    def end(self, ending: Ending, *, status: int = 0) -> None:
        if self._tally is not None:
            self._tally.num_here -= 1
            self._tally = None
        super().end(ending, status=status)
