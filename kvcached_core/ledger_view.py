"""What the ledger knows at one moment, as values that stay as they are."""

from dataclasses import dataclass

from kvcached_core.ledger_file import NO_LIMIT, Row
from kvcached_core.sharing import Policy


@dataclass(frozen=True)
class InstanceView:
    """What the ledger knows of one instance at one moment; sizes in bytes."""

    row: int
    name: str
    engine: str
    pid: int
    limit_bytes: int | None
    floor_bytes: int
    priority: int
    page_bytes: int
    virtual_bytes: int
    resident_bytes: int
    used_bytes: int
    cached_bytes: int
    idle_bytes: int
    promised_bytes: int
    static_bytes: int
    asked_bytes: int
    coming_bytes: int
    waiting_bytes: int
    num_mapped_bytes: int
    num_unmapped_bytes: int
    num_refused: int
    num_asked: int
    num_answered: int
    last_used_seconds: float

    @property
    def policy(self) -> Policy:
        """Its limit, floor and priority."""
        return Policy(self.limit_bytes, self.floor_bytes, self.priority)

    @property
    def excess_bytes(self) -> int:
        """What it holds above its limit."""
        return 0 if self.limit_bytes is None else max(self.resident_bytes - self.limit_bytes, 0)


@dataclass(frozen=True)
class DeviceView:
    """One device and its instances at one moment.

    Attributes:
        device: The name of its ledger: `host`, or the GPU's UUID.
        capacity_bytes: What the instances may hold together.
        instances: Who shares it.
        device_free_bytes: What nobody has allocated on it, where others than the instances use it
            too, as on a GPU; None where the capacity is all there is to know.
    """

    device: str
    capacity_bytes: int
    instances: tuple[InstanceView, ...]
    device_free_bytes: int | None = None

    @property
    def free_bytes(self) -> int:
        """Bytes that are neither resident nor promised, nor in somebody else's use."""
        promised = sum(view.promised_bytes for view in self.instances)
        resident = sum(view.resident_bytes for view in self.instances)
        free = self.capacity_bytes - resident - promised
        if self.device_free_bytes is None:
            return free
        return min(free, self.device_free_bytes - promised)


def view_of(row: Row) -> InstanceView:
    """Return what a row says now."""
    resident, used, cached = row.resident_bytes, row.used_bytes, row.cached_bytes
    return InstanceView(
        row=row.index,
        name=row.name,
        engine=row.engine,
        pid=row.holder(0)[0],
        limit_bytes=None if row.limit_bytes == NO_LIMIT else row.limit_bytes,
        floor_bytes=row.floor_bytes,
        priority=row.priority,
        page_bytes=row.page_bytes,
        virtual_bytes=row.virtual_bytes,
        resident_bytes=resident,
        used_bytes=used,
        cached_bytes=cached,
        idle_bytes=resident - used - cached,
        promised_bytes=row.promised_bytes,
        static_bytes=row.static_bytes,
        asked_bytes=row.asked_bytes,
        coming_bytes=row.coming_bytes,
        waiting_bytes=row.waiting_bytes,
        num_mapped_bytes=row.num_mapped_bytes,
        num_unmapped_bytes=row.num_unmapped_bytes,
        num_refused=row.num_refused,
        num_asked=row.num_asked,
        num_answered=row.num_answered,
        last_used_seconds=row.last_used_ns / 1e9,
    )
