"""What makes a GPU as small as a pool: a promise of all the rest, to nobody."""

from kvcached_core.ledger.ledger import Ledger


class Ballast:
    """A row of the benchmark's own that is promised all but `pool_bytes`; no memory is taken.

    Args:
        ledger: The servers' ledger; it is closed at the end.
        pool_bytes: What the engines may hold together.
    """

    def __init__(self, ledger: Ledger, pool_bytes: int) -> None:
        self._ledger = ledger
        self._row = self._ledger.register(name="ballast", engine="benchmark")
        self._pool_bytes = pool_bytes
        self.adjust()

    def adjust(self) -> None:
        """Promise more or less, so that what the engines hold and may get is the pool again."""
        others = [view for view in self._ledger.view().instances if view.row != self._row]
        shared = sum(view.resident_bytes + view.promised_bytes for view in others)
        beyond = self._ledger.free_bytes(self._row) + shared - self._pool_bytes
        if beyond > 0:
            self._ledger.promise(self._row, beyond, 1)
        else:
            self._ledger.cancel(self._row, -beyond)

    def close(self) -> None:
        """Give the row back."""
        self._ledger.unregister(self._row)
        self._ledger.close()
