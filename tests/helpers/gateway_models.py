"""Models as the line sees them, without engines: what a test says of them is what they do."""

from dataclasses import dataclass, field

from kvcached_gateway.errors import RefusedError
from kvcached_gateway.lease import Address, Ask, Ending, HowToClose, Lease, Woken
from kvcached_gateway.line.grantor import Readiness


@dataclass(eq=False)
class FakeLease:
    """A lease that its model remembers until it ends."""

    model: "FakeGrantor"
    ask: Ask
    waited_seconds: float
    address: Address = field(default_factory=lambda: Address("http://localhost"))
    woken: Woken = Woken.NONE
    had_first_byte: bool = False

    @property
    def model_id(self) -> str:
        return self.model.id

    def first_byte(self) -> bool:
        self.had_first_byte = True
        return True

    def held_by(self, close: HowToClose) -> None:
        del close

    def end(self, ending: Ending, *, status: int = 0) -> None:
        if self in self.model.leases:
            self.model.leases.remove(self)
            self.model.endings.append(ending)


@dataclass
class FakeGrantor:
    """Grants while it is up and has fewer leases than it may have."""

    id: str
    readiness: Readiness = Readiness.UP
    max_concurrent: int = 1_000_000
    start_seconds: float = 0.0
    devices: tuple[str, ...] = ("gpu",)
    failure: str = ""
    absent: str = ""  # an adapter that is not loaded
    leases: list[Lease] = field(default_factory=list)
    granted: list[Ask] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)

    def grant(self, ask: Ask, waited_seconds: float) -> Lease | None:
        if self.readiness is not Readiness.UP or len(self.leases) >= self.max_concurrent:
            return None
        if ask.model == self.absent:
            return None
        lease = FakeLease(self, ask, waited_seconds)
        self.leases.append(lease)
        self.granted.append(ask)
        return lease

    def may_go_past(self, ask: Ask) -> frozenset[str]:
        return frozenset((self.id,) if ask.model == self.absent else ())

    def refusal(self) -> RefusedError | None:
        return RefusedError(503, "model_failed", self.failure) if self.failure else None
