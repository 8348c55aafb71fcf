"""What the line answers to whoever gets no lease."""

from kvcached_gateway.errors import LEAST_RETRY_SECONDS, RefusedError


def queue_full(
    model_id: str, num_waiting: int, max_queue: int, oldest_wait_seconds: float
) -> RefusedError:
    """Say that as many wait as may."""
    return RefusedError(
        429,
        "queue_full",
        f"{num_waiting} requests wait for {model_id!r}; max_queue is {max_queue}",
        retry_after_seconds=max(LEAST_RETRY_SECONDS, oldest_wait_seconds),
    )


def not_up(model_id: str, why: str, hindrance: str, start_seconds: float) -> RefusedError:
    """Say that a model is not up yet, and what it waits for where that is known."""
    parts = (f"{model_id!r} is not up yet", why, hindrance)
    return RefusedError(
        503,
        "model_loading",
        "; ".join(part for part in parts if part),
        retry_after_seconds=max(LEAST_RETRY_SECONDS, start_seconds),
    )


def busy(model_id: str, waited_seconds: float, held: str = "") -> RefusedError:
    """Say that a model took nothing for as long as a request may wait, and why if it held back."""
    return RefusedError(
        503,
        "model_busy",
        f"{model_id!r} is busy; the request waited {waited_seconds:g} s, which is max_wait"
        f"{held and f'; {held}'}",
        retry_after_seconds=LEAST_RETRY_SECONDS,
    )


def late(model_id: str, reason: str) -> RefusedError:
    """Say that a request will miss its class's goal, and its class does not wait then."""
    return RefusedError(
        503,
        "late",
        f"{model_id!r} will not answer in time: the request {reason}; its class says: late: refuse",
        retry_after_seconds=LEAST_RETRY_SECONDS,
    )
