"""What the scheduler's side of an engine asks of the ledger, of an allocator and of an adapter."""

from collections.abc import Callable, Sequence
from typing import Protocol

from kvcached_core.memory.orders import PageOrders
from kvcached_core.weights.status import WeightStatus


class PageSource(Protocol):
    """Who promises pages: the ledger, for all devices of the instance at once."""

    def promise(self, num_pages: int, *, is_urgent: bool, num_spare: int = 0) -> int:
        """Promise up to `num_pages` pages, and up to `num_spare` more; return how many it is.

        Only an urgent wish, one without which a request has to wait, may make others give memory;
        the spare ones never do, and are left to who waits for memory.
        """

    def cancel(self, num_pages: int) -> None:
        """Take back a promise of `num_pages` pages that nobody mapped."""


class Blocks(Protocol):
    """Which blocks of a pool's open pages are free. The scheduler's thread calls it."""

    def num_empty_pages(self, *, is_live: bool) -> int:
        """Return how many open pages have only free blocks, or about so many.

        Where counting is dear it may be too many, and while requests are live a few too few.
        """

    def add(self, page: int) -> None:
        """Let the blocks of a page that is open now be taken."""

    def remove(self, pages: Sequence[int]) -> None:
        """Let the blocks of empty pages no longer be taken.

        Raises:
            PageStateError: If a page is not empty.
        """

    def empty_pages(self) -> Sequence[int]:
        """Return the open pages whose blocks are all free, in the order in which they shall go."""

    def count_pages(self) -> tuple[int, int]:
        """Return how many pages hold a block of a request, and how many only cached blocks."""


class EnginePort(Protocol):
    """All that an adapter says of its engine. The scheduler's thread calls it, but for `wake`."""

    @property
    def can_be_woken(self) -> bool:
        """False for an engine that runs in its caller's process, and has no loop."""

    def is_busy(self) -> bool:
        """Return whether there are requests that run or wait."""

    def is_live(self) -> bool:
        """Return whether a request holds blocks."""

    def num_waiting(self) -> int:
        """Return how many requests wait to be scheduled; a refused one may be among them."""

    def num_idle_blocks(self) -> int:
        """Return how many blocks of open pages are free, or only cached."""

    def carry_out(self, orders: PageOrders | None, *, wait: bool) -> None:
        """Have pages mapped and unmapped, between two steps.

        Args:
            orders: Which pages; None if there are no new ones.
            wait: Return when all orders are carried out, these and earlier ones.
        """

    def evict(self, num_pages: int) -> bool:
        """Drop cached blocks until about so many pages are empty; return False if there are none.

        The pages that go first are those that nobody used for longest.
        """

    def finish_copies(self) -> None:
        """Begin copies of cached blocks that were put off, and wait until none is open."""

    def num_locked_blocks(self, number: int) -> int:  # noqa: ARG002  an engine may lock none
        """Return about how many cached blocks of a pool cannot be dropped, as they are copied."""
        return 0

    def end_copies(self) -> bool:
        """Wait for open copies that keep cached blocks from being dropped, and let go of these.

        It is asked only where a request would have to stop otherwise, or where nothing runs.

        Returns:
            Whether there were any.
        """
        return False

    def publish(self) -> None:
        """Tell those that mirror the prefix cache what left it."""

    def weight_status(self) -> WeightStatus | None:
        """Return what there is of the weights of this scheduler's ranks; None if they never go."""
        return None

    def hold_weights(self, num_missing: int) -> WeightStatus:
        """Have all but the last pages of each rank's weights there.

        More pages are mapped and copied, and the next step waits for that on the device. Fewer are
        dropped some at a time, behind all steps, so that who waits gets the first ones early; those
        stay that could not be brought back.

        Args:
            num_missing: How many pages each rank lacks then; one that has fewer lacks them all.

        Returns:
            What is there then: less than was wanted if others than engines took the memory.
        """
        raise RuntimeError(f"weights that never go shall lack {num_missing} pages")

    def finish_weights(self) -> None:
        """Let what is launched beside steps find all weights, where steps wait for each layer."""
        raise RuntimeError("weights that never go are waited for")

    def wake(self, answer: Callable[[], None]) -> None:
        """Make the engine's loop call `answer` when it is idle; any thread."""
