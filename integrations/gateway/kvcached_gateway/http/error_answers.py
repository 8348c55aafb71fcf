"""What we answer ourselves, in OpenAI's form."""

import json
import math

from aiohttp import web

from kvcached_gateway.errors import RefusedError
from kvcached_gateway.http.headers import REQUEST_ID

__all__ = ["ENGINE_DIED", "error_event", "error_json", "is_error_event", "refusal"]

ENGINE_DIED = "engine_died"

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
UNREAD = frozenset({401, 408, 413, 415})  # the connection's next bytes are this request's body


def error_event(code: str, message: str) -> bytes:
    """Return an error as one event of a stream."""
    return f"data: {error_json('server_error', code, message)}\n\n".encode()


def is_error_event(event: bytes) -> bool:
    """Return whether an event of a stream is an error, as `error_event` makes one."""
    try:
        said = json.loads(event.strip().removeprefix(b"data: "))
    except ValueError:
        return False
    return isinstance(said, dict) and isinstance(said.get("error"), dict)


def refusal(error: RefusedError, id_: str) -> web.Response:
    """Return an error for a client.

    Args:
        error: What is answered.
        id_: The request's id.
    """
    is_ours = error.status >= web.HTTPInternalServerError.status_code
    kind = KINDS.get(error.status, "server_error" if is_ours else "invalid_request_error")
    headers = {REQUEST_ID: id_}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if error.status == web.HTTPUnauthorized.status_code:
        headers["WWW-Authenticate"] = "Bearer"
    response = web.Response(
        status=error.status,
        body=error_json(kind, error.code, error.message).encode(),
        headers=headers,
        content_type="application/json",
    )
    if error.status in UNREAD:
        response.force_close()
    return response


def error_json(kind: str, code: str, message: str) -> str:
    """Return an error as JSON: its type, a word for programs, a sentence for people."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
