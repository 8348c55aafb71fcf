"""What the gateway answers where an engine does not, and what it raises about engines."""

from kvcached_core.errors import KVCachedError

__all__ = [
    "LEAST_RETRY_SECONDS",
    "AdoptionError",
    "EngineDiedError",
    "EngineStartError",
    "GatewayRunningError",
    "RefusedError",
    "RefusedVerbError",
    "StateFileError",
    "draining",
    "model_not_found",
]

LEAST_RETRY_SECONDS = 1.0  # what a Retry-After says can be no less
DRAIN_RETRY_SECONDS = 5.0  # another one may serve by then


class RefusedError(KVCachedError):
    """A request gets this answer in place of an engine's, in OpenAI's form.

    Attributes:
        status: The HTTP status.
        code: A word for programs, such as `model_not_found`.
        message: A sentence for people: what, its value, what is allowed.
        retry_after_seconds: When to ask again, or None where that will not help.
    """

    def __init__(
        self, status: int, code: str, message: str, *, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_seconds = retry_after_seconds


def model_not_found(name: str) -> RefusedError:
    """Return what is answered where there is no such model, or the client may not know of it."""
    return RefusedError(404, "model_not_found", f"there is no model {name!r} here")


def draining() -> RefusedError:
    """Return what is answered while the gateway ends."""
    return RefusedError(
        503,
        "draining",
        "the gateway takes no new requests",
        retry_after_seconds=DRAIN_RETRY_SECONDS,
    )


def past_deadline(name: str) -> RefusedError:
    """Return what is answered where the client's own deadline came before a lease."""
    return RefusedError(504, "deadline", f"{name!r} took no request before its client's deadline")


class RefusedVerbError(KVCachedError, RuntimeError):
    """A model cannot be steered like this now; the message says why."""


class EngineDiedError(KVCachedError, ConnectionError):
    """An engine went away before the first byte of its answer; the request may be asked again."""


class EngineStartError(KVCachedError, RuntimeError):
    """An engine did not start; the message begins with the cause, and ends with its log's end.

    Attributes:
        is_out_of_memory: Whether it found too little memory, of a device or of the host.
    """

    def __init__(self, message: str, *, is_out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.is_out_of_memory = is_out_of_memory


class AdoptionError(KVCachedError, RuntimeError):
    """An engine of an earlier gateway is not what was written down of it; the message says how."""


class GatewayRunningError(KVCachedError, RuntimeError):
    """Another gateway serves from the same folder; the message names its process."""


class StateFileError(KVCachedError, RuntimeError):
    """What an earlier gateway wrote down of its engines cannot be read, and was set aside."""
