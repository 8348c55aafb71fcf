"""What a worker and the controller's process say to each other: frames over one socket.

A frame is its length, four bytes, and a message in msgpack. What is written within one turn of the
loop goes out in one piece.
"""

import asyncio
from typing import Any, cast

import msgspec

from kvcached_gateway.lease import Address, Ask, Ending, Woken
from kvcached_gateway.observe import Answer, Where

__all__ = [
    "Answered",
    "CancelTake",
    "Cancelled",
    "Close",
    "Closed",
    "Denied",
    "End",
    "FirstByte",
    "FramesProtocol",
    "FromController",
    "FromWorker",
    "Granted",
    "Query",
    "Refused",
    "Reply",
    "Rules",
    "Take",
]

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 1 << 26  # the settings, or the metrics, of very many models


class _Message(msgspec.Struct, array_like=True, tag=True):
    """A message; `number` names one lease, or one question, of a worker."""


class Take(_Message):
    """Ask for a lease."""

    number: int
    ask: Ask


class CancelTake(_Message):
    """The client left while it waited."""

    number: int


class FirstByte(_Message):
    """The first byte of the answer came."""

    number: int


class End(_Message):
    """Give a lease back."""

    number: int
    ending: Ending
    status: int


class Answered(_Message):
    """As `Observer.answered`."""

    answer: Answer


class Refused(_Message):
    """As `Observer.refused`."""

    model_id: str | None
    code: str


class Cancelled(_Message):
    """As `Observer.cancelled`."""

    where: Where


class Query(_Message):
    """Ask for the status (as JSON) or for the metrics."""

    number: int
    is_status: bool


class Granted(_Message):
    """A lease."""

    number: int
    model_id: str
    address: Address
    woken: Woken
    waited_seconds: float


class Close(_Message):
    """Begin no answer on a lease any more; one that has begun goes on."""

    number: int


class Closed(_Message):
    """None begins any more, unless a `FirstByte` came before this."""

    number: int


class Denied(_Message):
    """There will be no lease."""

    number: int
    status: int
    code: str
    message: str
    retry_after_seconds: float | None


class Reply(_Message):
    """What was asked for."""

    number: int
    data: bytes


class Rules(_Message):
    """What holds from now on, for each request that comes.

    Attributes:
        settings: As JSON.
        keys: As JSON, or None where there are none.
        is_ready: Whether new requests are taken.
    """

    settings: bytes
    keys: bytes | None
    is_ready: bool


FromWorker = Take | CancelTake | FirstByte | Closed | End | Answered | Refused | Cancelled | Query
FromController = Granted | Close | Denied | Reply | Rules

_encoder = msgspec.msgpack.Encoder()


class FramesProtocol(asyncio.Protocol):
    """One side of a connection; a child says what becomes of a message and of the end.

    Args:
        kinds: The messages that the other side may send.
    """

    def __init__(self, kinds: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kinds)
        self._received = bytearray()
        self._unsent: list[bytes] = []
        self._transport: asyncio.Transport | None = None

    def came(self, message: Any) -> None:
        """Handle a message."""
        raise NotImplementedError

    def ended(self) -> None:
        """Handle the end of the connection; nothing comes any more."""
        raise NotImplementedError

    def send(self, message: _Message) -> None:
        """Send a message, soon; nothing happens where the connection has ended."""
        data = _encoder.encode(message)
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent += (len(data).to_bytes(LENGTH_BYTES), data)

    def close(self) -> None:
        """End the connection behind what was sent."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        del exc
        self._transport = None
        self.ended()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        received = self._received
        received += data
        at = 0
        while len(received) - at >= LENGTH_BYTES:
            start = at + LENGTH_BYTES
            end = start + int.from_bytes(received[at:start])
            if end - start > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {end - start} bytes; {MAX_FRAME_BYTES} are allowed")
            if len(received) < end:
                break
            self.came(self._decoder.decode(received[start:end]))
            at = end
        del received[:at]

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if unsent and self._transport is not None:
            self._transport.write(b"".join(unsent))
