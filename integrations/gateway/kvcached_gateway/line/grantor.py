"""What the line sees of a model: whether it serves, and its leases."""

from enum import StrEnum
from typing import Protocol

from kvcached_gateway.errors import RefusedError
from kvcached_gateway.lease import Ask, Lease


class Readiness(StrEnum):
    """What a request may expect of a model."""

    COLD = "cold"  # it stays down until somebody starts it
    COMING = "coming"  # it starts, or goes down and will be cold
    UP = "up"  # it serves, or wakes by itself when it is asked


class Grantor(Protocol):
    """What the line sees of a model."""

    @property
    def id(self) -> str:
        """Its name in the file."""

    @property
    def readiness(self) -> Readiness:
        """Whether it serves."""

    @property
    def start_seconds(self) -> float:
        """What its start takes, measured; 0 before the first."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Where it runs or is about to; nothing where it has no place."""

    def grant(self, ask: Ask, waited_seconds: float) -> Lease | None:
        """Return a lease, or None: not now."""

    def may_go_past(self, ask: Ask) -> frozenset[str]:
        """Return the names whose requests need not wait behind one that has just got no lease.

        There are some where it waits for its adapter alone.
        """

    def refusal(self) -> RefusedError | None:
        """Return, in a new error each time, why nothing will come of it; None where it may."""
