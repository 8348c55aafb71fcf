"""What is read of a body: a model's name and whether the answer is a stream, and nothing more."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcached_gateway.errors import RefusedError
from kvcached_gateway.http.body import Wish, read_wish

JSON = "application/json"
FORM = 'multipart/form-data; boundary="b0.x"'


def refused(body: bytes, content_type: str = JSON) -> tuple[int, str]:
    with pytest.raises(RefusedError) as caught:
        read_wish(body, content_type)
    return caught.value.status, caught.value.code


def form(*parts: tuple[str, bytes], end: bytes = b"--b0.x--\r\n") -> bytes:
    whole = b""
    for disposition, content in parts:
        whole += b"--b0.x\r\nContent-Disposition: form-data; " + disposition.encode()
        whole += b"\r\n\r\n" + content + b"\r\n"
    return whole + end


values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(), values), st.builds(Wish, st.text(min_size=1), st.booleans()))
def test_the_model_is_found_among_whatever_else(others: dict[str, object], wish: Wish) -> None:
    body = others | {"model": wish.model, "stream": wish.is_stream}
    assert read_wish(json.dumps(body).encode(), JSON) == wish


def test_of_a_name_that_is_there_twice_the_last_counts_as_it_does_for_engines() -> None:
    body = b'{"model": "a", "x": {"model": "c"}, "model": "b"}'
    assert read_wish(body, JSON).model == json.loads(body)["model"] == "b"


def test_a_stream_that_is_no_boolean_is_left_to_the_engine() -> None:
    for stream in (b'"true"', b"1", b"[]", b"null"):
        assert read_wish(b'{"model": "a", "stream": %s}' % stream, JSON) == Wish(
            "a", is_stream=False
        )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b'["model"]',
        b'{"model": "a"',
        b'{"model": "a"} {"model": "b"}',
        b'{"model": "a", "x": NaN}',
        b'\xef\xbb\xbf{"model": "a"}',
        '{"model": "a"}'.encode("utf-16"),
        b'{"model": "\xff"}',
        b'{"model": "a", "x": ' + b"[" * 100_000,
        b'{"model": ["a"]}',
        b"model=a",
    ],
)
def test_a_body_that_is_not_strict_json_is_refused(body: bytes) -> None:
    assert refused(body) == (400, "invalid_body")


def test_a_body_names_a_model_of_a_sane_length() -> None:
    assert refused(b"{}") == refused(b'{"model": ""}') == (400, "model_missing")
    assert refused(json.dumps({"model": "a" * 513}).encode()) == (400, "model_name_too_long")


def test_a_form_says_its_model_in_a_field_beside_a_file() -> None:
    sound = random.Random(0).randbytes(100_000) + b"\r\n--b0.y\r\n"
    body = form(
        ('name="file"; filename="model"', sound),
        ('name="model"', b"whisper"),
        ('name="stream"', b"true"),
    )
    assert read_wish(body, FORM) == Wish("whisper", is_stream=True)
    assert read_wish(form(("name=model", b"w")), "Multipart/Form-Data; boundary=b0.x").model == "w"


@pytest.mark.parametrize(
    ("body", "content_type", "code"),
    [
        (form(('name="model"', b"a"), ('name="model"', b"b")), FORM, "invalid_body"),
        (form(('name="file"', b"a")), FORM, "model_missing"),
        (form(('name="model"', b"a")), "multipart/form-data", "invalid_body"),
        (b"--b0.x\r\nContent-Disposition: form-data; name=model\r\n\r\na", FORM, "invalid_body"),
        (form(*[('name="x"', b"")] * 65, ('name="model"', b"a")), FORM, "invalid_body"),
        (form(('name="model"', b"a" * 5000)), FORM, "invalid_body"),
        (b"", FORM, "model_missing"),
    ],
)
def test_a_form_that_can_be_read_in_two_ways_is_refused(
    body: bytes, content_type: str, code: str
) -> None:
    assert refused(body, content_type) == (400, code)
