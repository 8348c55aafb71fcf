"""Who may ask what: a client's key, the models of that key, and what its headers may say."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvcached_gateway.errors import RefusedError
from kvcached_gateway.http.body import Wish
from kvcached_gateway.http.front import Front, KeyView
from kvcached_gateway.lease import Ask
from kvcached_gateway.settings.config import ModelSettings

__all__ = ["CLASS", "DEADLINE_MS", "Permitted", "admit", "permit"]

CLASS = "X-Kvcached-Class"
DEADLINE_MS = "X-Kvcached-Deadline-Ms"
MAX_DEADLINE_MS = 24 * 3600 * 1000


@dataclass(frozen=True)
class Permitted:
    """What a request may have: its ask, and its model where the name is known."""

    ask: Ask
    model: ModelSettings | None


def admit(front: Front, headers: Mapping[str, str]) -> KeyView | None:
    """Return the key of a request, or None where the gateway has no keys.

    Raises:
        RefusedError: If keys are asked for and this is none (401).
    """
    keys = front.keys()
    if keys is None:
        return None
    given = headers.get("Authorization")
    if given is None and "x-api-key" in headers:  # as clients of /v1/messages say it
        given = f"Bearer {headers['x-api-key']}"
    key = keys.find(given)
    if key is None:
        raise RefusedError(
            401,
            "invalid_api_key",
            "the header Authorization brings no key of this gateway; it has to be 'Bearer KEY'",
        )
    return key


def permit(
    front: Front,
    key: KeyView | None,
    headers: Mapping[str, str],
    wish: Wish,
    path: str,
    body_bytes: int,
) -> Permitted:
    """Turn what a body asks for into what the line is asked for.

    Raises:
        RefusedError: If the key may not have that model (403), or the headers name a class or a
            deadline that the key may not set (403) or that cannot be (400).
    """
    settings = front.settings()
    model = settings.resolve(wish.model)
    allowed = None if key is None else key.models
    if allowed is not None and model is not None and not {model.id, wish.model} & {*allowed}:
        raise RefusedError(
            403, "model_not_allowed", f"this key may not ask the model {wish.model!r}"
        )
    class_name, deadline = headers.get(CLASS), headers.get(DEADLINE_MS)
    if (class_name, deadline) != (None, None) and not (key is None or key.may_set_deadline):
        raise RefusedError(
            403, "header_not_allowed", f"this key may set neither {CLASS} nor {DEADLINE_MS}"
        )
    if class_name is None and key is not None:
        class_name = key.class_name
    elif class_name is not None and class_name not in settings.classes:
        known = ", ".join(sorted(settings.classes)) or "none"
        raise RefusedError(
            400, "unknown_class", f"{CLASS} is {class_name!r}; the classes are: {known}"
        )
    ask = Ask(
        wish.model,
        path,
        body_bytes,
        is_stream=wish.is_stream,
        class_name=class_name,
        deadline_seconds=None if deadline is None else _deadline_seconds(deadline),
        key=None if key is None else key.name,
    )
    return Permitted(ask, model)


def _deadline_seconds(value: str) -> float:
    if not (value.isascii() and value.isdigit() and 0 < int(value[:12]) <= MAX_DEADLINE_MS):
        raise RefusedError(
            400,
            "invalid_deadline",
            f"{DEADLINE_MS} is {value!r}; allowed are 1 to {MAX_DEADLINE_MS} milliseconds",
        )
    return int(value) / 1000
