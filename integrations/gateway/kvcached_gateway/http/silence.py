"""Connections that end soon after their other side fell silent: it is gone, or takes nothing."""

import socket
from typing import Protocol

__all__ = ["end_when_silent"]

PROBE_SECONDS = 2
NUM_PROBES = 3


class Options(Protocol):
    """A socket, as far as its options go."""

    def setsockopt(self, level: int, name: int, value: int, /) -> None:
        """Set one."""


def end_when_silent(connection: Options, seconds: int) -> None:
    """End a connection, or each that a listening socket accepts, this long after the last word.

    A machine that is gone says nothing, and one that takes nothing lets nothing more be sent.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, NUM_PROBES)
    # No probe goes out while bytes that were sent wait for a word; without this they wait long.
    unheard_ms = 1000 * (seconds + NUM_PROBES * PROBE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unheard_ms)
