"""What the HTTP front needs of the rest of the gateway: values and calls, no state of its own.

A worker, which has neither models nor a controller, is served by the same front.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvcached_gateway.lease import Leases
from kvcached_gateway.observe import Observer
from kvcached_gateway.settings.config import Settings

__all__ = ["Front", "KeyView", "KeysView"]


class KeyView(Protocol):
    """A client's key."""

    @property
    def name(self) -> str:
        """What logs call it."""

    @property
    def models(self) -> Sequence[str] | None:
        """The ids that it may ask, or None for all."""

    @property
    def class_name(self) -> str | None:
        """The class of its requests, or None for their model's."""

    @property
    def max_concurrent(self) -> int | None:
        """How many of its requests may be here at once, or None."""

    @property
    def requests_per_minute(self) -> float | None:
        """How many it may send a minute, or None."""

    @property
    def may_set_deadline(self) -> bool:
        """Whether its requests may name a class and a deadline."""


class KeysView(Protocol):
    """The keys of a keys file."""

    def find(self, authorization: str | None) -> KeyView | None:
        """Return the key in a header `Authorization`, or None; in constant time over all keys."""


@dataclass(frozen=True)
class Front:
    """What requests are answered with. Everything is called on the loop's thread.

    Attributes:
        leases: Where the right to an engine comes from.
        settings: The settings that hold now.
        keys: The keys that hold now; None where the gateway has none.
        status: Every model for `/v1/models`: at least `id`, `state`, `device` and `queue`.
        exposition: The metrics, in Prometheus's text format.
        observe: Who counts.
        is_ready: Whether new requests are taken; no longer while the gateway drains.
    """

    leases: Leases
    settings: Callable[[], Settings]
    keys: Callable[[], KeysView | None]
    status: Callable[[], Awaitable[list[dict[str, Any]]]]
    exposition: Callable[[], Awaitable[str]]
    observe: Observer
    is_ready: Callable[[], bool] = lambda: True
