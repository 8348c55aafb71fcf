"""What the gateway shows of itself: on its admin socket, in the metrics, in `kvcached top`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ADMIN_SOCKET", "About", "Decision", "DeviceRow", "ModelRow", "status_rows"]

ADMIN_SOCKET = Path("gateway") / "gateway.sock"  # in KVCACHED_DIR


@dataclass(frozen=True)
class About:
    """The gateway itself.

    Attributes:
        file: The file of models that it serves.
        listen: Where it listens.
        pid: Its process.
        uptime_seconds: How long it has been there.
        is_draining: Whether it takes no new requests.
    """

    file: str
    listen: str
    pid: int
    uptime_seconds: float
    is_draining: bool = False


@dataclass(frozen=True)
class ModelRow:
    """A model now.

    Attributes:
        id: Its name in the file.
        instance: Its name in the ledger; nothing for one that has no engine of ours.
        state: What it does: a word of `state.State`, or `remote` or `adapter`.
        since_seconds: For how long.
        reason: Why.
        devices: Where its engine is, or is about to be.
        num_leases: Requests that its engine has.
        num_waiting: Requests that wait for it.
        oldest_wait_seconds: How long the first of them has waited.
        num_starts: How often its engine was started.
        start_seconds: What a start takes, an average; 0 before the first.
        class_name: Its class.
        is_pinned: Whether it is never stopped for another.
        failure: Why its last start failed, or nothing.
        retry_seconds: When a failed one is tried again.
        log: The file that its engine writes to.
        weighted_rate: KV bytes a second over its goal for a token, as placement counts.
        prefill_tokens_per_second: How fast it reads prompts, measured; 0 before.
    """

    id: str
    state: str
    instance: str = ""
    since_seconds: float = 0.0
    reason: str = ""
    devices: tuple[str, ...] = ()
    num_leases: int = 0
    num_waiting: int = 0
    oldest_wait_seconds: float = 0.0
    num_starts: int = 0
    start_seconds: float = 0.0
    class_name: str | None = None
    is_pinned: bool = False
    failure: str = ""
    retry_seconds: float = 0.0
    log: str = ""
    weighted_rate: float = 0.0
    prefill_tokens_per_second: float = 0.0


@dataclass(frozen=True)
class DeviceRow:
    """A device now, or the host's memory.

    Attributes:
        id: The device, as the ledger names it; `memory` for engines and copies on the host.
        capacity_bytes: What all engines may hold.
        free_bytes: What nobody holds.
        models: Whose engines are there.
        kv_pressure_ratio: Weighted rates over the memory that they share, as placement counts.
    """

    id: str
    capacity_bytes: int
    free_bytes: int
    models: tuple[str, ...] = ()
    kv_pressure_ratio: float = 0.0


@dataclass(frozen=True)
class Decision:
    """One decision of the controller.

    Attributes:
        at: When, in seconds since 1970.
        verb: What was decided, such as `start`, `stop`, `move` or `wait`.
        model_id: About which model, or nothing.
        reason: Why, as a sentence.
        inputs: What it was decided from, as JSON knows it.
    """

    at: float
    verb: str
    model_id: str
    reason: str
    inputs: Mapping[str, Any] = field(default_factory=dict)


def status_rows(rows: Iterable[ModelRow]) -> list[dict[str, Any]]:
    """Return what clients are shown of each model."""
    return [
        {"id": row.id, "state": row.state, "device": list(row.devices), "queue": row.num_waiting}
        for row in rows
    ]
