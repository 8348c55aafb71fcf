"""What a request's body says of its model; the bytes themselves go on as they came."""

import asyncio
from dataclasses import dataclass
from email.parser import BytesHeaderParser

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from kvcached_gateway.errors import RefusedError

__all__ = ["BODY_SECONDS", "Wish", "read_body", "read_wish"]

BODY_SECONDS = 60.0  # for the whole of it
MAX_NAME_CHARACTERS = 512
MAX_FIELD_BYTES = 4096
MAX_PARTS = 64


@dataclass(frozen=True)
class Wish:
    """What a body says: the name of a model, and whether the answer comes in parts."""

    model: str
    is_stream: bool


class _Fields(msgspec.Struct):
    model: str = ""
    stream: object = None  # the engine judges what it is


_decoder = msgspec.json.Decoder(_Fields)


async def read_body(
    request: web.BaseRequest, max_bytes: int, seconds: float = BODY_SECONDS
) -> bytes:
    """Read the whole body of a request.

    Raises:
        RefusedError: If it is longer than `max_bytes` (413, unread where its length says so), takes
            longer than `seconds` (408), is compressed (415) or breaks off (400).
    """
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise RefusedError(
            415, "compressed_body", f"Content-Encoding is {encoding!r}; only identity is allowed"
        )
    length = request.content_length
    if length is not None and length > max_bytes:
        raise _too_long(max_bytes)
    content = request.content
    try:
        if content.is_eof() and length is not None:
            return content.read_nowait()  # it came with its headers
        async with asyncio.timeout(seconds):
            chunks, size = [], 0
            while chunk := await content.readany():
                size += len(chunk)
                if size > max_bytes:
                    raise _too_long(max_bytes)
                chunks.append(chunk)
    except TimeoutError:
        raise RefusedError(
            408, "slow_body", f"the body did not arrive within {seconds:g} s"
        ) from None
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise RefusedError(400, "broken_body", f"the body cannot be read: {error}") from None
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def read_wish(body: bytes, content_type: str) -> Wish:
    """Find the model's name in a body of JSON or of a form with files.

    Raises:
        RefusedError: If the body is neither, or names no model, or more than one.
    """
    if content_type[:20].lower().startswith("multipart/form-data"):
        return _read_form(body, content_type)
    try:
        fields = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(400, "invalid_body", f"the body is not JSON as asked: {error}") from None
    return _wish(fields.model, is_stream=fields.stream is True)


def _wish(model: str, *, is_stream: bool) -> Wish:
    if not model:
        raise RefusedError(400, "model_missing", "the body has no field 'model'; it names a model")
    if len(model) > MAX_NAME_CHARACTERS:
        raise RefusedError(
            400,
            "model_name_too_long",
            f"the field 'model' has {len(model)} characters; {MAX_NAME_CHARACTERS} are allowed",
        )
    return Wish(model, is_stream)


def _read_form(body: bytes, content_type: str) -> Wish:
    fields: dict[str, str] = {}
    for name, start, end in _parts(body, content_type):
        if name is None or name not in {"model", "stream"}:
            continue
        if name in fields:
            raise RefusedError(400, "invalid_body", f"the form has the field {name!r} twice")
        if end - start > MAX_FIELD_BYTES:
            raise RefusedError(400, "invalid_body", f"the form's field {name!r} is too long")
        fields[name] = body[start:end].decode("utf-8", "replace").strip()
    is_stream = fields.get("stream", "").lower() in {"true", "1", "on", "yes"}
    return _wish(fields.get("model", ""), is_stream=is_stream)


def _parts(body: bytes, content_type: str) -> list[tuple[str | None, int, int]]:
    """Return the name of each field, and where its content begins and ends."""
    whole = BytesHeaderParser().parsebytes(
        b"Content-Type: " + content_type.encode("latin-1", "replace") + b"\r\n\r\n"
    )
    boundary = whole.get_boundary()
    if not boundary:
        raise RefusedError(400, "invalid_body", "the form's Content-Type names no boundary")
    line = b"--" + boundary.encode("latin-1", "replace")
    found: list[tuple[str | None, int, int]] = []
    at = body.find(line)
    while at >= 0 and body[at + len(line) : at + len(line) + 2] != b"--":
        start = body.find(b"\r\n\r\n", at)
        end = body.find(b"\r\n" + line, at + len(line))
        if not 0 <= start < end or len(found) == MAX_PARTS:
            raise RefusedError(
                400, "invalid_body", f"the form is broken, or has more than {MAX_PARTS} parts"
            )
        head = body[at + len(line) + 2 : min(start, at + MAX_FIELD_BYTES)]
        found.append((_field_name(head), start + 4, end))
        at = end + 2
    return found


def _field_name(head: bytes) -> str | None:
    name = (
        BytesHeaderParser()
        .parsebytes(head + b"\r\n\r\n")
        .get_param("name", header="content-disposition")
    )
    return name if isinstance(name, str) else None


def _too_long(max_bytes: int) -> RefusedError:
    return RefusedError(
        413, "body_too_long", f"the body is longer than the {max_bytes} bytes allowed"
    )
