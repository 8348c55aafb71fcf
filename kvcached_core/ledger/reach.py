"""How near an instance is to the end of the memory that it can get."""

import time

from kvcached_core.ledger.policy import shares
from kvcached_core.ledger.view import DeviceView, InstanceView


def reachable_bytes(device: DeviceView, instance: InstanceView) -> int:
    """Return what an instance could use for requests on a device beside what they use now.

    That is what it holds or is promised and no request uses, and up to its limit what a request
    that waits would be promised now and what its neighbours would have to give: by the rules of
    `policy`, so it borrows below the floors of those that do not wait, and requests of others stop
    only where it is below its own floor.

    Args:
        device: The device.
        instance: One of its instances.
    """
    peers = [view for view in device.instances if view.row != instance.row]
    everybody = (*peers, instance)
    spoken_for = sum(view.promised_bytes + view.static_bytes for view in everybody)
    free = device.capacity_bytes - spoken_for - sum(view.resident_bytes for view in everybody)
    if device.device_free_bytes is not None:
        free = min(free, device.device_free_bytes - spoken_for)
    free -= sum(min(peer.unmet_floor_bytes, peer.waiting_bytes) for peer in peers)
    given = sum(peer.coming_bytes for peer in peers) + sum(
        share.give_bytes + share.owed_bytes
        for share in shares(instance, peers, device.capacity_bytes, now_ns=time.time_ns())
    )
    more = max(free + given, 0)
    if instance.limit_bytes is not None:
        more = min(more, instance.limit_bytes - instance.held_bytes)
    own = instance.held_bytes - instance.used_bytes
    return max(own + more, 0)


def pressure(device: DeviceView, instance: InstanceView) -> float:
    """Return which share of the memory that an instance could use its requests use, 0 to 1.

    It is 1 while the instance waits for memory, and where there is not one page more for it. A
    program has no requests: its is 0.

    Args:
        device: The device; an instance on several is as near the end as on the fullest.
        instance: One of its instances.
    """
    if instance.is_program:
        return 0.0
    page_bytes = max(instance.page_bytes, 1)
    reachable = reachable_bytes(device, instance) // page_bytes * page_bytes
    if instance.waiting_bytes or not reachable:
        return 1.0
    return instance.used_bytes / (instance.used_bytes + reachable)
