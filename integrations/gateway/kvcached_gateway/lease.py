"""The right of one request to its engine: asked for, held until the last byte, given back.

Whoever serves HTTP knows engines only through this module: in the controller's process, and in
each worker of `workers: N`, where leases come over a socket.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol


class Woken(StrEnum):
    """What a request had to wait for beside other requests: `X-Kvcached-Cold-Start`."""

    NONE = "none"
    WAKE = "wake"
    START = "start"


class Ending(StrEnum):
    """How a lease ended."""

    DONE = "done"  # the engine's answer went out whole, whatever its status
    CANCELLED = "cancelled"  # the client left
    DIED_BEFORE = "died_before"  # the engine went away before the first byte
    DIED_WITHIN = "died_within"  # the engine went away after it


@dataclass(frozen=True)
class Ask:
    """What a request says of itself.

    Attributes:
        model: The name that the client wrote: a model, an alias or an adapter.
        path: The path, one of the public ones.
        body_bytes: The size of the body, the only measure of its prompt before an engine saw it.
        is_stream: Whether the answer comes in parts.
        class_name: The class whose goals hold for it, or None for its model's own.
        deadline_seconds: How long its client waits from now on, or None.
        key: The name of the client's key, or None where there are no keys.
        is_again: Whether its engine died before its first byte; it goes to the front, once.
    """

    model: str
    path: str
    body_bytes: int
    is_stream: bool = False
    class_name: str | None = None
    deadline_seconds: float | None = None
    key: str | None = None
    is_again: bool = False

    def patience(self, most_seconds: float) -> tuple[float, bool]:
        """Return how long it waits, where none waits longer than this, and if that is its own."""
        own = self.deadline_seconds
        return (own, True) if own is not None and own <= most_seconds else (most_seconds, False)

    def later(self, seconds: float) -> "Ask":
        """Return it as it is so many seconds later: its client waits less from then on."""
        if self.deadline_seconds is None:
            return self
        return replace(self, deadline_seconds=self.deadline_seconds - seconds)


@dataclass(frozen=True)
class Address:
    """Where an engine listens: a Unix socket, or a port of the loopback (or of `url:`).

    Attributes:
        url: The beginning of its URLs, without a slash at the end; `http://localhost` for a socket.
        socket: The path of its Unix socket, or None.
        headers: What each request to it carries, such as its key; never shown to a client.
        is_ours: Whether we started what listens there, and so know that it closes no connection.
        is_gateway: Whether a gateway of ours listens there, on another machine, whose own headers
            and errors are for the client, too.
    """

    url: str
    socket: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_ours: bool = False
    is_gateway: bool = False


# Returns when no answer begins any more on a lease, or one has and `Lease.first_byte` said so.
HowToClose = Callable[[], Awaitable[None]]


class Lease(Protocol):
    """One request's right to its engine, until the last byte of the answer."""

    model_id: str  # as in the file, also where the client wrote an alias
    address: Address
    woken: Woken
    waited_seconds: float

    def first_byte(self) -> bool:
        """Say that the first byte of the answer came; return whether it may be passed on.

        It may not where the engine is about to end and does not wait for the answer: then the
        request is asked again.
        """

    def held_by(self, close: HowToClose) -> None:
        """Say that another process passes the answer on, and how that is told to begin none."""

    def end(self, ending: Ending, *, status: int = 0) -> None:
        """Give it back; a second call does nothing."""


class WrappedLease:
    """A lease that does what the one inside it does; a child adds to it.

    Args:
        inner: The lease inside it.
    """

    def __init__(self, inner: Lease) -> None:
        self._inner = inner
        self.model_id = inner.model_id
        self.address = inner.address
        self.woken = inner.woken
        self.waited_seconds = inner.waited_seconds

    def first_byte(self) -> bool:
        """See `Lease.first_byte`."""
        return self._inner.first_byte()

    def held_by(self, close: HowToClose) -> None:
        """See `Lease.held_by`."""
        self._inner.held_by(close)

    def end(self, ending: Ending, *, status: int = 0) -> None:
        """See `Lease.end`."""
        self._inner.end(ending, status=status)


class Leases(Protocol):
    """Where leases come from."""

    async def take(self, ask: Ask) -> Lease:
        """Wait for the right to an engine; a cancelled call leaves no trace.

        Raises:
            RefusedError: If there will be none: no such model, a full line, too long a wait, a
                model that failed.
        """
