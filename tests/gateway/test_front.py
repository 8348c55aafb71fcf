"""The public port without engines: what is refused, by whom, and how it is said."""

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from helpers.gateway_front import (
    FakeKey,
    FakeKeys,
    House,
    PatientLeases,
    RefusingLeases,
    front_served,
    make_settings,
    read_torn,
    say,
)
from helpers.loops import on_a_loop

from kvcached_gateway.errors import RefusedError
from kvcached_gateway.http.app import ENGINE_PATHS
from kvcached_gateway.lease import Ask

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "tiny", "messages": []}).encode()

# What engines have beside OpenAI's paths, and what our own admin socket has.
NOT_PUBLIC = (
    *("/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/reset_prefix_cache"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/invocations", "/inference/v1/generate"),
    *("/pause", "/resume", "/abort_requests", "/update_weights", "/init_weight_transfer_engine"),
    *("/scale_elastic_ep", "/server_info", "/load", "/version", "/ping", "/docs", "/openapi.json"),
    *("/release_memory_occupation", "/resume_memory_occupation", "/update_weights_from_disk"),
    *("/flush_cache", "/start_profile", "/stop_profile", "/generate", "/get_server_info"),
    *("/get_model_info", "/set_internal_state", "/abort_request", "/shutdown", "/ui", "/"),
    *("/admin/models", "/admin/models/tiny/stop", "/admin/reload", "/admin/drain"),
    *("/v1/chat/completions/", "/v1/chat/completions/../../sleep", "//sleep", "/v1/%2e%2e/sleep"),
    *("/v1/chat/completions/render", "/v1/responses/abc", "/v1/responses/abc/cancel", "/v1"),
)


async def post(
    house: House, body: bytes = BODY, path: str = CHAT, **headers: str
) -> tuple[int, Any, Any]:
    """Return the status, the JSON and the headers of an answer."""
    given = {"Content-Type": "application/json"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    async with (
        aiohttp.ClientSession() as session,
        session.post(house.url + path, data=body, headers=given) as answer,
    ):
        return answer.status, await answer.json(content_type=None), answer.headers


async def code(house: House, body: bytes = BODY, **headers: str) -> tuple[int, str]:
    """Return the status and the code of an error, which has OpenAI's form."""
    status, said, _ = await post(house, body, **headers)
    assert set(said) == {"error"}
    assert set(said["error"]) == {"message", "type", "param", "code"}
    return status, said["error"]["code"]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
@on_a_loop
async def test_what_is_not_public_is_not_found(method: str) -> None:
    async with front_served(leases := RefusingLeases()) as house:
        for path in NOT_PUBLIC:
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            said = await say(house, f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY)
            assert said.startswith(b"HTTP/1.1 404 "), path
            assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "path_not_found"
        assert not leases.asks


@on_a_loop
async def test_each_public_path_asks_for_the_model_of_its_body() -> None:
    async with front_served(leases := RefusingLeases()) as house:
        for path in ENGINE_PATHS:
            status, said, headers = await post(house, path=path)
            assert (status, said["error"]["code"]) == (503, "model_loading")
            assert headers["Retry-After"] == "7"  # in whole seconds, never too early
        assert leases.asks == [Ask("tiny", path, len(BODY)) for path in ENGINE_PATHS]
        assert house.written.told == [("refused", "tiny", "model_loading")] * len(ENGINE_PATHS)


@on_a_loop
async def test_a_public_path_has_no_other_method() -> None:
    async with front_served(leases := RefusingLeases()) as house:
        for method in ("GET", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT"):
            said = await say(
                house, f"{method} {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
            )
            assert said.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 ")), method
        assert not leases.asks


SMUGGLED = {
    "a length and chunks": (
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /sleep"
    ),
    "two lengths": b"Content-Length: 2\r\nContent-Length: 9\r\n\r\n{}GET /sleep",
    "a list of lengths": b"Content-Length: 2, 9\r\n\r\n{}GET /sleep",
    "a signed length": b"Content-Length: +2\r\n\r\n{}",
    "a length with a space in it": b"Content-Length: 1 0\r\n\r\n{}",
    "a space before the colon": b"Content-Length : 2\r\n\r\n{}",
    "chunks that are not last": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunks twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "an encoding that is none": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a size of a chunk that is none": b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n",
    "a chunk longer than its size": b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}{}\r\n0\r\n\r\n",
    "a folded header": b"X-A: b\r\n c\r\nContent-Length: 2\r\n\r\n{}",
    "a null in a header": b"X-A: b\x00c\r\nContent-Length: 2\r\n\r\n{}",
    "a line end alone in a header": b"X-A: b\rContent-Length: 7\r\nContent-Length: 2\r\n\r\n{}",
    "a header without a name": b": b\r\nContent-Length: 2\r\n\r\n{}",
    "a long header": b"X-A: " + b"a" * 9000 + b"\r\nContent-Length: 2\r\n\r\n{}",
    "many headers": b"X-A: b\r\n" * 200 + b"Content-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("pair", SMUGGLED)
@on_a_loop
async def test_a_request_that_can_be_read_in_two_ways_is_refused_and_ends_its_connection(
    pair: str,
) -> None:
    async with front_served(leases := RefusingLeases()) as house:
        said = await say(house, f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n".encode() + SMUGGLED[pair])
        assert said.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
        assert said.count(b"HTTP/1.") == 1
        assert not leases.asks


@on_a_loop
async def test_a_head_that_does_not_end_is_cut_off() -> None:
    async with front_served(RefusingLeases(), idle_seconds=0.1) as house:
        assert await say(house, f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nX-A: ".encode()) == b""
        assert await say(house, b"") == b""


@on_a_loop
async def test_a_body_that_does_not_end_is_refused() -> None:
    async with front_served(leases := RefusingLeases(), body_seconds=0.1) as house:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode()
        said = await say(house, head + BODY)
        assert said.startswith(b"HTTP/1.1 408 ")
        assert b"slow_body" in said
        assert not leases.asks


@on_a_loop
async def test_a_body_that_is_too_long_is_refused_unread_where_its_length_says_so() -> None:
    settings = make_settings(max_body_bytes=len(BODY))
    async with front_served(leases := RefusingLeases(), settings=settings) as house:
        assert await code(house, BODY) == (503, "model_loading")
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {1 << 40}\r\n\r\n".encode()
        said = await say(house, head)
        assert said.startswith(b"HTTP/1.1 413 ")
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        said = await say(house, head + b"%x\r\n%s \r\n" % (len(BODY) + 1, BODY))
        assert said.startswith(b"HTTP/1.1 413 ")
        assert b"body_too_long" in said
        assert len(leases.asks) == 1


@on_a_loop
async def test_a_compressed_body_is_refused() -> None:
    async with front_served(leases := RefusingLeases()) as house:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\n".encode()
        said = await say(house, head + b"Content-Length: 9\r\n\r\n" + b"\x1f\x8b\x08" * 3)
        assert said.startswith(b"HTTP/1.1 415 ")
        assert not leases.asks


@on_a_loop
async def test_a_body_without_a_readable_model_is_refused() -> None:
    async with front_served(leases := RefusingLeases()) as house:
        assert await code(house, b'{"messages": []}') == (400, "model_missing")
        assert await code(house, b'{"model": 3}') == (400, "invalid_body")
        assert await code(house, b"") == (400, "invalid_body")
        assert not leases.asks


@on_a_loop
async def test_a_request_id_is_the_clients_where_it_is_plain() -> None:
    async with front_served(RefusingLeases()) as house:
        _, _, headers = await post(house, X_Request_Id="trace-1.2:3")
        assert headers["X-Request-Id"] == "trace-1.2:3"
        made = set()
        for odd in ("a" * 129, "a b", "<script>", "ä"):
            _, _, headers = await post(house, X_Request_Id=odd)
            made.add(headers["X-Request-Id"])
            assert len(headers["X-Request-Id"]) == 32
        assert len(made) == 4


@on_a_loop
async def test_who_has_no_key_is_refused_before_the_body_is_read() -> None:
    keys = FakeKeys(good=FakeKey("me"))
    async with front_served(leases := RefusingLeases(), keys=keys) as house:
        for wrong in ({}, {"Authorization": "Bearer bad"}, {"x_api_key": "bad"}):
            assert await code(house, **wrong) == (401, "invalid_api_key")
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {1 << 30}\r\n\r\n".encode()
        assert (await say(house, head)).startswith(b"HTTP/1.1 401 ")
        assert not leases.asks
        assert (await code(house, Authorization="Bearer good"))[0] == 503
        assert (await code(house, x_api_key="good"))[0] == 503
        assert [ask.key for ask in leases.asks] == ["me", "me"]


@on_a_loop
async def test_a_key_asks_only_for_its_models_and_sees_no_others() -> None:
    keys = FakeKeys(some=FakeKey("some", models=("tiny",)), all=FakeKey("all"))
    async with front_served(leases := RefusingLeases(), keys=keys) as house:
        slow = BODY.replace(b"tiny", b"slow")
        assert await code(house, slow, Authorization="Bearer some") == (403, "model_not_allowed")
        assert not leases.asks
        assert (await code(house, BODY.replace(b"tiny", b"gpt"), Authorization="Bearer some"))[
            0
        ] == 503
        seen = {}
        async with aiohttp.ClientSession() as session:
            for name in ("some", "all"):
                headers = {"Authorization": f"Bearer {name}"}
                async with session.get(house.url + "/v1/models", headers=headers) as answer:
                    seen[name] = [card["id"] for card in (await answer.json())["data"]]
                async with session.get(house.url + "/v1/models/slow", headers=headers) as answer:
                    assert answer.status == {"some": 404, "all": 200}[name]
            async with session.get(house.url + "/v1/models") as answer:
                assert answer.status == 401
        assert seen == {"some": ["tiny"], "all": ["tiny", "slow"]}


@on_a_loop
async def test_class_and_deadline_are_for_keys_that_may_set_them() -> None:
    keys = FakeKeys(may=FakeKey("may", may_set_deadline=True), plain=FakeKey("p", class_name="b"))
    may, plain = {"Authorization": "Bearer may"}, {"Authorization": "Bearer plain"}
    wished = {"X_Kvcached_Class": "chat", "X_Kvcached_Deadline_Ms": "1500"}
    async with front_served(leases := RefusingLeases(), keys=keys) as house:
        assert await code(house, **plain, **wished) == (403, "header_not_allowed")
        assert (await code(house, **plain))[0] == 503
        assert (await code(house, **may, **wished))[0] == 503
        odd = {"X_Kvcached_Class": "odd"}
        assert await code(house, **may, **odd) == (400, "unknown_class")
        for late in ("0", "-1", "1e3", "9" * 30, "²"):
            late_headers = {"X_Kvcached_Deadline_Ms": late}
            assert await code(house, **may, **late_headers) == (400, "invalid_deadline")
        assert [(ask.class_name, ask.deadline_seconds) for ask in leases.asks] == [
            ("b", None),
            ("chat", pytest.approx(1.5, abs=1.4)),
        ]


@on_a_loop
async def test_who_drains_says_so_and_takes_nothing() -> None:
    async with front_served(leases := RefusingLeases()) as house, aiohttp.ClientSession() as get:
        assert (await get.get(house.url + "/ready")).status == 200
        house.is_ready = False
        assert (await get.get(house.url + "/ready")).status == 503
        assert (await get.get(house.url + "/health")).status == 200
        assert await code(house) == (503, "draining")
        assert not leases.asks


@on_a_loop
async def test_models_are_listed_with_what_they_do() -> None:
    async with front_served(RefusingLeases()) as house, aiohttp.ClientSession() as session:
        async with session.get(house.url + "/v1/models/gpt") as answer:
            card = await answer.json()
        assert card == {
            "id": "tiny",
            "object": "model",
            "created": 0,
            "owned_by": "kvcached",
            "kvcached": {"state": "warm", "device": "host", "queue": 0},
        }
        async with session.get(house.url + "/v1/models/../../sleep") as answer:
            assert answer.status == 404
        async with session.get(house.url + "/metrics") as answer:
            assert "kvcached_gateway_queued" in await answer.text()


@pytest.mark.parametrize(("state", "where"), [("warm", "line"), ("starting", "loading")])
@on_a_loop
async def test_a_client_that_leaves_the_line_is_gone_from_it(state: str, where: str) -> None:
    async with front_served(leases := PatientLeases()) as house:
        house.state = state
        asking = asyncio.create_task(post(house))
        await leases.came.wait()
        asking.cancel()
        await leases.left.wait()
        await house.written.cancelled_one.wait()
        assert house.written.told == [("cancelled", where)]


@on_a_loop
async def test_a_stream_that_waits_for_a_start_gets_comments_and_then_an_error_and_no_clean_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvcached_gateway.http.passage.COMMENT_SECONDS", 0.05)
    body = json.dumps({"model": "slow", "stream": True}).encode()
    async with front_served(leases := PatientLeases()) as house, aiohttp.ClientSession() as session:
        async with session.post(house.url + CHAT, data=body) as answer:
            assert answer.status == 200
            assert answer.content_type == "text/event-stream"
            for _ in range(2):
                assert await answer.content.readuntil(b"\n\n") == b": the model is starting\n\n"
            leases.answer.set_exception(RefusedError(503, "model_failed", "it did not start"))
            rest = await read_torn(answer.content)
        event = rest.rpartition(b"data: ")[2]
        assert json.loads(event)["error"]["code"] == "model_failed"
        assert house.written.told == [("refused", "slow", "model_failed")]
