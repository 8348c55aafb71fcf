"""What is free on a device, as a ledger's words say it: the arithmetic, and nothing else."""

from collections.abc import Sequence

from kvcached_core.ledger.file import (
    CAPACITY,
    FLOOR,
    HEADER_WORDS,
    LIMIT,
    NO_LIMIT,
    NUM_USED_ROWS,
    PROMISED,
    RESIDENT,
    ROW_WORDS,
    STATIC,
    TAKEN,
    WAITING,
    WAKING,
    WEIGHTS,
    Row,
    RowKey,
)


def free_bytes(
    words: memoryview,
    rows: Sequence[Row],
    base: int,
    device_free_bytes: int | None = None,
    *,
    is_waiting: bool = False,
) -> int:
    """Return what is free for the row at `base`, its limit aside; negative if it is too late.

    That is what nobody holds, is promised or has announced, its own announcement aside, less what
    is missing to the others' floors: all of it, or for a request that waits what they wait for.

    Args:
        words: The ledger's words.
        rows: Its rows.
        base: Where the row begins.
        device_free_bytes: What may be mapped on the device, where others use it too.
        is_waiting: Whether a request waits for it: then it borrows what nobody else waits for.
    """
    end = HEADER_WORDS + words[NUM_USED_ROWS] * ROW_WORDS
    taken = sum(words[HEADER_WORDS + TAKEN : end : ROW_WORDS]) - words[base + STATIC]
    free: int = words[CAPACITY] - taken
    if device_free_bytes is not None:
        resident = sum(words[HEADER_WORDS + RESIDENT : end : ROW_WORDS])
        free = min(free, device_free_bytes - (taken - resident))
    if sum(words[HEADER_WORDS + FLOOR : end : ROW_WORDS]) > words[base + FLOOR]:
        for row in rows[: words[NUM_USED_ROWS]]:
            if row.base != base:
                unmet = row.unmet_floor_bytes
                free -= min(unmet, row.waiting_bytes) if is_waiting else unmet
    return free


def room_bytes(
    words: memoryview,
    rows: Sequence[Row],
    base: int,
    device_free_bytes: int | None,
    *,
    is_waiting: bool = False,
) -> int:
    """Return what the row at `base` can be promised: what is free, up to its limit for KV."""
    free = free_bytes(words, rows, base, device_free_bytes, is_waiting=is_waiting)
    free -= words[base + STATIC]
    limit = words[base + LIMIT]
    if limit == NO_LIMIT:
        return free
    held = words[base + RESIDENT] - words[base + WEIGHTS] + words[base + PROMISED]
    return int(min(free, limit - held))


def younger_bytes(words: memoryview, rows: Sequence[Row], base: int) -> int:
    """Return what those have announced that wake after the row at `base`.

    One wakes after the other, so the first counts as free what later ones wait for. For a row that
    does not wake, it is 0.
    """
    since = words[base + WAKING]
    if not since:
        return 0
    return sum(
        words[row.base + STATIC]
        for row in rows[: words[NUM_USED_ROWS]]
        if (words[row.base + WAKING], row.base) > (since, base)
    )


def waiting_bytes(words: memoryview) -> int:
    """Return what all instances together wait for."""
    end = HEADER_WORDS + words[NUM_USED_ROWS] * ROW_WORDS
    return sum(words[HEADER_WORDS + WAITING : end : ROW_WORDS])


def waiting_rows(words: memoryview, rows: Sequence[Row]) -> list[RowKey]:
    """Return who waits and could have at least a page of what it waits for."""
    return [
        row.key
        for row in rows[: words[NUM_USED_ROWS]]
        if row.waiting_bytes
        and free_bytes(words, rows, row.base, is_waiting=True)
        + younger_bytes(words, rows, row.base)
        >= min(row.waiting_bytes, max(row.page_bytes, 1))
    ]
