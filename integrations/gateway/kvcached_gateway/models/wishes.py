"""What is wished of a model: an engine, or its end."""

from dataclasses import dataclass

from kvcached_gateway.engines.state_file import EngineRecord

__all__ = ["Begin", "End"]


@dataclass(frozen=True)
class Begin:
    """A wish for an engine; for one that runs already where there is a record of it."""

    devices: tuple[str, ...]
    reason: str
    record: EngineRecord | None = None


@dataclass(frozen=True)
class End:
    """A wish to end it.

    Attributes:
        drain_seconds: How long leases are waited for; None is until the last.
        is_kept: Whether the engine lives on, for a later gateway.
        is_at_once: Whether leases are not waited for, and the engine ends without a word to those
            who hold them.
    """

    reason: str
    drain_seconds: float | None = None
    is_kept: bool = False
    is_at_once: bool = False
