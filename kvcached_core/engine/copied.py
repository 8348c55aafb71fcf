"""Which cached blocks a tier has as well: to drop these costs a copy back, and not their tokens."""

from collections.abc import Hashable, Iterable


class CopiedBlocks:
    """The blocks of which a tier has copies, as far as that is known here.

    A block counts as long as it holds what was copied, and as no more was copied since than the
    tier has room for: nobody says what a tier has dropped. The scheduler's thread calls it.

    Args:
        num_blocks: What the tier has room for.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._num_copied = 0
        self._copied: dict[int, tuple[Hashable, int]] = {}  # what, and how many were copied before
        self._open: dict[Hashable, list[tuple[int, Hashable]]] = {}

    def begin(self, copy: Hashable, blocks: Iterable[tuple[int, Hashable]]) -> None:
        """Note which blocks a copy is of: their ids, and names of what they hold, or None."""
        self._open[copy] = [each for each in blocks if each[1] is not None]

    def end(self, copy: Hashable) -> None:
        """Note that a copy is complete; one that nobody began is none."""
        for block_id, content in self._open.pop(copy, ()):
            self._copied[block_id] = content, self._num_copied
            self._num_copied += 1

    def clear(self) -> None:
        """Forget everything: the tier was emptied, or may have been."""
        self._copied.clear()
        self._open.clear()

    def has(self, block_id: int, content: Hashable) -> bool:
        """Return whether the tier has a copy of a block that holds this now."""
        found = self._copied.get(block_id)
        if found is None:
            return False
        copied, at = found
        return copied == content and self._num_copied - at <= self._num_blocks
