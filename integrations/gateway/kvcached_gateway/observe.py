"""What the data path tells whoever counts: one call for each request, none for a chunk."""

from dataclasses import dataclass
from typing import Literal, Protocol

from kvcached_gateway.lease import Woken

__all__ = ["Answer", "Observer", "Where"]

Where = Literal["line", "loading", "stream"]


@dataclass(frozen=True)
class Answer:
    """An engine's answer that went out whole, or broke off after its first byte (status 502).

    Attributes:
        model_id: The model, as in the file.
        class_name: The class that the request asked for, or None.
        status: The engine's HTTP status.
        waited_seconds: What the request spent in the line.
        ttft_seconds: From its arrival to the first byte of the answer, or None without one.
        seconds: From its arrival to the last byte.
        woken: What it waited for beside other requests.
    """

    model_id: str
    class_name: str | None
    status: int
    waited_seconds: float
    ttft_seconds: float | None
    seconds: float
    woken: Woken


class Observer(Protocol):
    """Counts and times of requests; called on the loop's thread, and must not block it."""

    def answered(self, answer: Answer) -> None:
        """An engine's answer went out."""

    def refused(self, model_id: str | None, code: str) -> None:
        """We answered with an error of ours; the model is None where the request named none."""

    def cancelled(self, where: Where) -> None:
        """The client left: in the line, while its model started or woke, or after dispatch."""
