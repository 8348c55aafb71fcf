"""Changes of a row by its own instance that are about its weights."""

from dataclasses import dataclass

from kvcached_core.ledger.activations import NO_ACTIVATIONS, Activations
from kvcached_core.ledger.file import HEADER_WORDS, NUM_USED_ROWS, ROW_WORDS, WAKING, Row

NO_WISH = 0


@dataclass
class WeightChanges:
    """What an instance did with its weights; sizes in bytes.

    The sums of several calls say the same as the calls, as those of `Changes` do; but it matters
    what was mapped before something was announced.

    Attributes:
        mapped_bytes: What was mapped, since something was announced if it was.
        unmapped_bytes: What was unmapped since then.
        announced: What is to be allocated from then on, and whether for weights that come back:
            the last that was told; None for nothing.
        earlier: What was mapped and unmapped before.
        offer: What may be asked for, and until when (`time_ns`) not by equals: likewise the last.
        expected_until_ns: Until when there will be news of weights that are not offered yet.
        activations: The times that all weights came back.
        ended_wish: The wish that is over.
    """

    mapped_bytes: int = 0
    unmapped_bytes: int = 0
    announced: tuple[int, bool] | None = None
    earlier: tuple[int, int] = (0, 0)
    offer: tuple[int, int] | None = None
    expected_until_ns: int | None = None
    activations: Activations = NO_ACTIVATIONS
    ended_wish: int = NO_WISH

    def add(self, later: "WeightChanges") -> None:
        """Add what was done afterwards."""
        if later.announced is not None:
            mapped_bytes, unmapped_bytes = self.earlier
            self.earlier = mapped_bytes + self.mapped_bytes, unmapped_bytes + self.unmapped_bytes
            self.mapped_bytes = self.unmapped_bytes = 0
            self.announced = later.announced
        self.mapped_bytes += later.mapped_bytes
        self.unmapped_bytes += later.unmapped_bytes
        if later.offer is not None:
            self.offer, self.expected_until_ns = later.offer, None
        if later.expected_until_ns is not None:
            self.expected_until_ns = later.expected_until_ns
        self.activations += later.activations
        self.ended_wish = later.ended_wish or self.ended_wish

    def write(self, row: Row, now_ns: int) -> int:
        """Write it into the instance's row; return how many announced bytes are allocated now."""
        write_weights(row, *self.earlier)
        allocated_bytes = self.earlier[0] + self.mapped_bytes
        if self.announced is not None:
            num_bytes, is_waking = self.announced
            allocated_bytes += write_announcement(row, num_bytes, now_ns, is_waking=is_waking)
        write_weights(row, self.mapped_bytes, self.unmapped_bytes)
        if self.offer is not None:
            row.weights_offered_bytes, row.weights_kept_until_ns = self.offer
        if self.expected_until_ns is not None and not row.weights_offered_bytes:
            row.weights_kept_until_ns = self.expected_until_ns
        if self.activations is not NO_ACTIVATIONS:
            self.activations.write(row.activations)
        if self.ended_wish and row.weights_wish == self.ended_wish:
            row.weights_wish = NO_WISH
        return allocated_bytes


def write_weights(row: Row, mapped_bytes: int, unmapped_bytes: int) -> None:
    """Write into the instance's row what of its weights was mapped, and what was unmapped then."""
    if not mapped_bytes and not unmapped_bytes:
        return
    if mapped_bytes and row.weights_bytes + mapped_bytes >= row.weights_needed_bytes:
        row.waking_since_ns = 0
    weights_bytes = max(row.weights_bytes + mapped_bytes - unmapped_bytes, 0)
    row.resident_bytes = max(row.resident_bytes + weights_bytes - row.weights_bytes, 0)
    row.weights_bytes = weights_bytes
    row.static_bytes = max(row.static_bytes - mapped_bytes, 0)
    row.coming_bytes = max(row.coming_bytes - unmapped_bytes, 0)
    row.num_mapped_bytes += mapped_bytes
    row.num_unmapped_bytes += unmapped_bytes
    row.num_freed_bytes += unmapped_bytes


def write_announcement(row: Row, static_bytes: int, now_ns: int, *, is_waking: bool) -> int:
    """Write into the instance's row what it is about to allocate; return what that is less.

    Who wakes comes behind all that wake already, whatever the clock says.
    """
    less_bytes = max(row.static_bytes - static_bytes, 0)
    row.static_bytes = static_bytes
    if not is_waking:
        row.waking_since_ns = 0
    elif not row.waking_since_ns:
        words = row.words
        end = HEADER_WORDS + words[NUM_USED_ROWS] * ROW_WORDS
        last_ns = max(words[HEADER_WORDS + WAKING : end : ROW_WORDS], default=0)
        row.waking_since_ns = max(now_ns, last_ns + 1)
    return less_bytes
