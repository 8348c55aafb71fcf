"""A forked child owns nothing: what it inherits of ours is let go of there, and does nothing more.

A descriptor that a child keeps would keep its parent's locks alive, and a lock is shared with the
child instead of held against it. A child that starts another program has closed them by then.
"""

import os
import weakref
from typing import Protocol


class _Owner(Protocol):
    def disown(self) -> None:
        """Close what was inherited. Runs in the child, before anything else does."""


_owners: "weakref.WeakSet[_Owner]" = weakref.WeakSet()


def disown_in_children(owner: _Owner) -> None:
    """Call `owner.disown()` in every child that this process forks while `owner` exists."""
    _owners.add(owner)


def _disown_all() -> None:
    for owner in list(_owners):
        owner.disown()
    _owners.clear()


os.register_at_fork(after_in_child=_disown_all)
