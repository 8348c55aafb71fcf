"""Rows of a ledger, of which a test says what it is about."""

from dataclasses import replace
from typing import Any

from kvcached_core.ledger.file import RowKey
from kvcached_core.ledger.view import InstanceView

_ROW = InstanceView(
    row=RowKey(0, 1),
    name="a",
    engine="vllm",
    pid=1,
    pid_namespace=1,
    limit_bytes=None,
    floor_bytes=0,
    priority=0,
    page_bytes=1,
    virtual_bytes=1,
    least_bytes=1,
    resident_bytes=0,
    used_bytes=0,
    cached_bytes=0,
    idle_bytes=0,
    promised_bytes=0,
    static_bytes=0,
    asked_bytes=0,
    coming_bytes=0,
    waiting_bytes=0,
    num_mapped_bytes=0,
    num_unmapped_bytes=0,
    num_refused=0,
    num_asked=0,
    num_answered=0,
    last_used_seconds=0.0,
)


def row(**changes: Any) -> InstanceView:
    """Return a row with some of its words."""
    return replace(_ROW, **changes)
