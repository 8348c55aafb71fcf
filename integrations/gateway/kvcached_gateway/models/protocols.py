"""What a model needs of an engine, and of what starts one; what its task needs of it."""

from typing import Protocol

from kvcached_gateway.engines.state_file import EngineRecord
from kvcached_gateway.engines.words import Counters
from kvcached_gateway.lease import Address
from kvcached_gateway.models.held_leases import HeldLeases
from kvcached_gateway.policy.demand import Mean
from kvcached_gateway.settings.config import ModelSettings
from kvcached_gateway.state import State

__all__ = ["EngineRunner", "RunningEngine", "Subject"]


class RunningEngine(Protocol):
    """What a model needs of its engine; `engine.Engine` is one."""

    @property
    def address(self) -> Address:
        """Where it listens."""

    @property
    def token(self) -> str:
        """What it answered to the known question."""

    @property
    def max_adapters(self) -> int:
        """How many adapters it keeps."""

    def serves(self, name: str) -> bool:
        """Return whether its model is called so there."""

    def record(self) -> EngineRecord | None:
        """Return what a later gateway needs to adopt it; None where it never is to."""

    async def ended(self) -> None:
        """Wait until its first process has ended."""

    async def end(self, grace_seconds: float, *, is_hung: bool = False) -> str:
        """End it to the last process; return how it ended, in words."""

    async def leave(self) -> None:
        """Leave it alone, alive."""

    async def health(self, seconds: float) -> bool:
        """Return whether it is well."""

    async def counters(self) -> Counters:
        """Return what it says of its work."""

    async def load_adapter(self, name: str, path: str) -> None:
        """Load an adapter."""

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter."""


class EngineRunner(Protocol):
    """What starts and adopts engines; `runner.Runner` is one."""

    async def start(
        self, settings: ModelSettings, devices: tuple[str, ...], token: str
    ) -> RunningEngine:
        """Return an engine that answered the known question; nothing is left of one that did not.

        Args:
            settings: The model.
            devices: Where it is to run.
            token: What it answered before, or nothing.

        Raises:
            EngineStartError: If it did not start; a cancelled call leaves nothing either.
        """

    async def adopt(self, settings: ModelSettings, record: EngineRecord) -> RunningEngine:
        """Return the engine of an earlier gateway; one that is not what it was is ended.

        Raises:
            AdoptionError: If it is none, and was ended.
        """


class Subject(Protocol):
    """The model as its task sees it; see `model.Model`."""

    settings: ModelSettings
    state: State
    devices: tuple[str, ...]
    failure: str
    is_out_of_memory: bool
    next_try_at: float
    starts: Mean
    num_starts: int
    token: str
    leases: HeldLeases

    @property
    def waits_for_memory(self) -> bool:
        """Whether its engine waits for memory that others have."""

    def go(self, state: State, reason: str) -> None:
        """Make a transition."""

    def has(self, engine: RunningEngine, seconds: float | None) -> None:
        """Have an engine."""

    def lost(self) -> None:
        """Have none any more."""
