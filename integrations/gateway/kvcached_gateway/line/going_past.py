"""Who goes past a request that waits for its adapter: all that do not wait for the same.

Nothing else lets a later request go first. While an adapter's place is still taken, only requests
for the model itself go past: others would keep the adapters that it could have a place of.
"""

from collections.abc import Callable

from kvcached_gateway.line.grantor import Grantor
from kvcached_gateway.line.tickets import Queue, Ticket


def serve_in_order(queue: Queue, model: Grantor, serve: Callable[[Ticket], bool]) -> None:
    """Give leases as requests came, until the model has none for whoever is next.

    Args:
        queue: Who waits.
        model: The model.
        serve: Gives one its lease, and says whether there was one.
    """
    while (ticket := queue.first()) and serve(ticket):
        pass
    names = model.may_go_past(ticket.ask) if ticket else frozenset()
    for later in list(queue) if names else ():
        if later.ask.model in names and not serve(later):
            names &= model.may_go_past(later.ask)
