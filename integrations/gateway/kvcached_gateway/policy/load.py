"""What models together take of one device, and how hard they press on the rest."""

from dataclasses import dataclass
from typing import NamedTuple


class Share(NamedTuple):
    """What one device has of a model.

    Attributes:
        rate: Its weighted rate there.
        taken_bytes: What is never there for KV: its residue, and weights that stay.
        wake_bytes: What it takes besides when weights that yielded come back.
        floor_bytes: The KV memory that it can always get back.
    """

    rate: float
    taken_bytes: int
    wake_bytes: int
    floor_bytes: int


@dataclass
class Load:
    """A device and what lies on it.

    Attributes:
        id: The device.
        free_bytes: What is left for KV without residues and the weights that stay.
    """

    id: str
    free_bytes: int
    _rate: float = 0.0
    _floor_bytes: int = 0
    _wake_bytes: int = 0

    @property
    def left_bytes(self) -> int:
        """What is free beside all floors."""
        return self.free_bytes - self._floor_bytes

    @property
    def left_awake_bytes(self) -> int:
        """The same while the largest weights that yielded have come back."""
        return self.left_bytes - self._wake_bytes

    def add(self, share: Share) -> None:
        """Put a model's share on it."""
        self._rate += share.rate
        self._floor_bytes += share.floor_bytes
        self._wake_bytes = max(self._wake_bytes, share.wake_bytes)
        self.free_bytes -= share.taken_bytes

    def spare_bytes(self, share: Share) -> int:
        """Return what one more would leave beside all floors when the largest wakes.

        It fits if that is more than nothing.
        """
        left_bytes = min(self.left_awake_bytes, self.left_bytes - share.wake_bytes)
        return left_bytes - share.taken_bytes - share.floor_bytes

    def pressure(self, *, plus: Share | None = None, minus: Share | None = None) -> float:
        """Return the KV pressure ratio: as it is, or with a share more or less."""
        rate, room_bytes = self._rate, self.free_bytes
        if plus:
            rate, room_bytes = rate + plus.rate, room_bytes - plus.taken_bytes
        if minus:
            rate, room_bytes = rate - minus.rate, room_bytes + minus.taken_bytes
        return max(rate, 0.0) / max(room_bytes, 1)
