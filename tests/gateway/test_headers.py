"""Which headers cross the gateway, and which stay on their side."""

from multidict import CIMultiDict, CIMultiDictProxy

from kvcached_gateway.http.headers import for_client, for_engine


def proxied(*pairs: tuple[str, str]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(pairs))


def test_a_clients_key_stays_here_and_the_engines_goes_along() -> None:
    given = proxied(
        ("AUTHORIZATION", "Bearer client"),
        ("X-Api-Key", "client"),
        ("Api-Key", "client"),
        ("Cookie", "a=client"),
        ("Accept", "text/event-stream"),
    )
    sent = for_engine(given, "id", {"Authorization": "Bearer engine"})
    assert dict(sent) == {
        "Accept": "text/event-stream",
        "X-Request-Id": "id",
        "Authorization": "Bearer engine",
    }


def test_headers_of_a_connection_do_not_cross() -> None:
    hop = proxied(
        ("Connection", "keep-alive, X-Mine"),
        ("connection", "X-Too"),
        ("X-mine", "1"),
        ("X-Too", "2"),
        ("Keep-Alive", "timeout=5"),
        ("TE", "trailers"),
        ("Trailer", "x"),
        ("Transfer-Encoding", "chunked"),
        ("Upgrade", "h2c"),
        ("Proxy-Authorization", "x"),
        ("Proxy-Connection", "close"),
    )
    assert dict(for_engine(hop, "id", {})) == {"X-Request-Id": "id"}
    assert dict(for_client(hop, "id")) == {"X-Request-Id": "id"}


def test_what_is_said_to_the_gateway_and_by_it_is_nobody_elses_to_say() -> None:
    ours = proxied(
        ("Host", "x"),
        ("Content-Length", "3"),
        ("Expect", "100-continue"),
        ("Origin", "http://page"),
        ("X-Request-Id", "theirs"),
        ("x-kvcached-class", "chat"),
    )
    assert dict(for_engine(ours, "id", {})) == {"X-Request-Id": "id"}
    engines = proxied(
        ("X-Kvcached-Queue-Ms", "1"),
        ("Set-Cookie", "a=b"),
        ("Access-Control-Allow-Origin", "*"),
        ("X-Request-Id", "theirs"),
    )
    assert dict(for_client(engines, "id")) == {"X-Request-Id": "id"}


def test_all_else_crosses_in_order_and_as_often_as_it_is_there() -> None:
    pairs = [("X-B", "1"), ("X-A", "2"), ("X-B", "3"), ("Content-Type", "audio/wav")]
    assert list(for_engine(proxied(*pairs), "id", {}).items())[:4] == pairs
    answered = [*pairs, ("Content-Length", "5"), ("Content-Encoding", "gzip")]
    assert list(for_client(proxied(*answered), "id").items())[:6] == answered
