"""Whether an address is this machine's own."""

from ipaddress import IPv6Address, ip_address

__all__ = ["is_loopback"]


def is_loopback(host: str) -> bool:
    """Return whether nobody but this machine has an address.

    Args:
        host: An address without a port, or a name; but for `localhost` no name is ours: it may lead
            anywhere.
    """
    if host == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    # A socket for both kinds of addresses writes one of the first kind so.
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback
