"""The admin socket: for its own user alone, with fixed verbs, and what the client reads of it."""

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path

import pytest
from helpers.gateway_steering import Written, admin_running
from helpers.waiting import PATIENCE_SECONDS

from kvcached_core.errors import ConfigError
from kvcached_gateway.admin.admin import bind_admin
from kvcached_gateway.admin.client import Client, GatewayError, NoGatewayError
from kvcached_gateway.admin.views import ADMIN_SOCKET, ModelRow

ONE = ModelRow("org/one", "cold", "org-one", devices=("host",), num_waiting=2, class_name="chat")
TWO = ModelRow("two", "busy", "two", num_leases=3)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Written, Path]]:
    with admin_running(tmp_path, ONE, TWO) as found:
        yield found


@pytest.fixture
def client(running: tuple[Written, Path], tmp_path: Path) -> Client:
    return Client(tmp_path)


def ask(path: Path, request: str) -> tuple[int, bytes]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_SECONDS)
        connection.connect(str(path))
        connection.sendall(f"{request}\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = HTTPResponse(connection)
        answer.begin()
        return answer.status, answer.read()


def test_rows_arrive_as_they_were_written(client: Client) -> None:
    assert client.models() == [ONE, TWO]
    assert client.devices()[0].models == ("one",)
    assert client.decisions()[0].inputs == {"needed_bytes": 7}
    assert client.about().listen == "127.0.0.1:8080"
    assert client.explain("org/one") == "org/one is warm: a request came"


@pytest.mark.parametrize("verb", ["warm", "sleep", "pin", "unpin"])
def test_a_verb_reaches_its_model(client: Client, running: tuple[Written, Path], verb: str) -> None:
    text, row, is_settled = client.steer("org/one", verb)
    assert (text, row.state, is_settled) == (f"org/one will {verb}", "warm", True)
    assert running[0].steered == [("org/one", verb)]


def test_a_verb_waits_only_as_long_as_it_is_told(
    client: Client, running: tuple[Written, Path]
) -> None:
    running[0].rest.clear()
    assert client.steer("two", "warm", 0.01)[2] is False


def test_a_refusal_is_said_in_the_gateways_words(client: Client) -> None:
    with pytest.raises(GatewayError, match=r"^'two' is pinned$"):
        client.steer("two", "stop")
    with pytest.raises(GatewayError, match=r"^there is no model 'tow'; did you mean 'two'"):
        client.explain("tow")


def test_a_reload_says_what_changed_or_which_mistake_there_is(
    client: Client, running: tuple[Written, Path]
) -> None:
    assert client.reload() == "added one"
    running[0].reloaded = ConfigError("models.yaml, line 3: no")
    with pytest.raises(GatewayError, match=r"^models.yaml, line 3: no$"):
        client.reload()


def test_drain_is_passed_on(client: Client, running: tuple[Written, Path]) -> None:
    client.drain()
    assert running[0].is_draining
    assert client.about().is_draining


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("POST /admin/models/two/explode HTTP/1.1", 404),
        ("POST /admin/models/two HTTP/1.1", 404),
        ("GET /admin/models/two/warm HTTP/1.1", 405),
        ("GET /admin HTTP/1.1", 404),
        ("GET /admin/../models HTTP/1.1", 404),
        ("POST /admin/models/two/warm?wait=nan HTTP/1.1", 400),
        ("POST /admin/models/two/warm?wait=-1 HTTP/1.1", 400),
        ("POST /admin/models/two/warm?wait=1e9 HTTP/1.1", 400),
        ("POST /admin/models/..%2F..%2Fetc/warm HTTP/1.1", 404),
    ],
)
def test_what_is_no_verb_is_refused_in_json(
    running: tuple[Written, Path], request_line: str, status: int
) -> None:
    found, body = ask(running[1], request_line)
    assert found == status
    assert json.loads(body)["error"]
    assert running[0].steered == []


def test_events_are_told_as_they_come(running: tuple[Written, Path]) -> None:
    written, path = running
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_SECONDS)
        connection.connect(str(path))
        connection.sendall(b"GET /admin/events HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = connection.makefile("rb")
        assert b"200" in answer.readline()
        while answer.readline() != b"\r\n":  # the headers: now it listens
            pass
        written.events.publish({"model": "one", "to": "warm"})
        # The loop of the other thread looks at its queue when something wakes it.
        ask(path, "GET /admin/about HTTP/1.1")
        answer.readline()  # the size of a part
        assert answer.readline() == b'data: {"model": "one", "to": "warm"}\n'


def test_the_socket_is_for_its_user_from_the_first_moment_on(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.touch()  # a dead gateway's
    old = os.umask(0)
    try:
        with bind_admin(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(old)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_another_user_is_refused_even_where_the_file_lets_them_in(
    running: tuple[Written, Path],
) -> None:
    path = running[1]
    path.chmod(0o666)
    path.parent.chmod(0o755)
    script = (
        "import os, socket, sys; os.chdir(sys.argv[1]); os.setuid(65534);"
        "s = socket.socket(socket.AF_UNIX); s.connect('gateway.sock');"
        "s.sendall(b'GET /admin/models HTTP/1.0\\r\\n\\r\\n'); print(s.recv(99))"
    )
    command = [sys.executable, "-c", script, path.parent]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "403" in done.stdout, done.stderr


def test_where_no_gateway_runs_the_client_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoGatewayError, match="no gateway serves from"):
        Client(tmp_path).models()
    with admin_running(tmp_path, ONE):
        assert Client(tmp_path).models()
    assert (tmp_path / ADMIN_SOCKET).exists()  # a socket's file outlives who bound it
    with pytest.raises(NoGatewayError, match="no gateway serves from"):
        Client(tmp_path).models()
