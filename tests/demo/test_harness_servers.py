"""Servers that are started together answer, report, and are gone together."""

import asyncio
import math
import time
from pathlib import Path
from typing import Any

import pytest

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.units import MIB
from kvcached_demo.harness import server as harness_server
from kvcached_demo.harness.engines import _VLLM, Words
from kvcached_demo.harness.load import Burst
from kvcached_demo.harness.plan import Plan
from kvcached_demo.harness.server import ServerError
from kvcached_demo.harness.servers import Servers

POOL = 64 * MIB
# What a server is to the harness: it listens, is healthy, has metrics, and ends when interrupted.
SCRIPT = """
import json, os, signal, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

port, how = int(sys.argv[1]), sys.argv[2:]
print("core", os.environ["VLLM_CPU_OMP_THREADS_BIND"], flush=True)
if "ends" in how:
    sys.exit("out of luck")
if "deaf" in how:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(b"# HELP asked_total x\\nasked_total{a="b"} 7.0\\n")

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

server = HTTPServer(("127.0.0.1", port), Handler)
if "busy" in how:
    time.sleep(600)
try:
    server.serve_forever()
except KeyboardInterrupt:
    print("bye", flush=True)
"""


class StandIn(_VLLM):
    """An engine without a model."""

    distributions = ()

    def serving(self, model: Path, name: str, port: int) -> Words:
        del model, name
        return ("-c", SCRIPT, str(port))


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    with Servers(tmp_path, POOL) as made:
        yield made


def start(servers: Servers, name: str, *how: str) -> None:
    servers.follow(Plan(StandIn(), name, how), Path("model"))


def test_all_are_waited_for_and_gone_behind_the_block(tmp_path: Path) -> None:
    with Servers(tmp_path, POOL) as servers:
        start(servers, "a")
        start(servers, "b")
        assert set(servers.wait_ready()) == {"a", "b"}
        assert servers["a"].post("/x", {"n": 1}).json() == {"n": 1}
        processes = [server.process for server in servers.by_name.values()]
        assert [process.poll() for process in processes] == [None, None]
    assert None not in [process.poll() for process in processes]


def test_a_server_that_is_started_again_takes_the_place_of_the_first(servers: Servers) -> None:
    start(servers, "a")
    first = servers["a"].process
    start(servers, "b")
    start(servers, "a")
    assert first.poll() is not None
    servers.wait_ready()
    assert [*servers.by_name] == ["a", "b"]
    assert servers["a"].log.read_text() == "core 0\n"


def test_a_server_that_ends_is_reported_with_the_end_of_its_log(servers: Servers) -> None:
    start(servers, "a", "ends")
    with pytest.raises(ServerError, match=r"'a' ended with exit code 1; (.|\n)*out of luck"):
        servers.wait_ready()


def test_a_server_that_does_not_answer_in_time_is_reported(servers: Servers) -> None:
    start(servers, "a", "busy")
    ticks: list[float] = []
    with pytest.raises(ServerError, match=r"'a' was not ready in 1 s"):
        servers.wait_ready(seconds=1.0, tick=lambda: ticks.append(time.monotonic()))
    assert ticks


def test_one_is_stopped_politely_and_a_deaf_one_not(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness_server, "STOP_SECONDS", 0.5)
    start(servers, "a")
    start(servers, "b", "deaf")
    servers.wait_ready()
    servers.stop()
    assert servers["a"].log.read_text().endswith("bye\n")
    assert servers["a"].process.returncode == 0
    assert servers["b"].process.returncode == -9


def test_a_metric_is_read_by_its_name_and_is_no_number_where_there_is_none(
    servers: Servers,
) -> None:
    start(servers, "a")
    servers.wait_ready("a")
    assert servers["a"].metric("asked_total") == 7.0
    assert math.isnan(servers["a"].metric("answered_total"))


def test_each_server_is_sent_its_own_burst_and_failures_are_answers(servers: Servers) -> None:
    start(servers, "a")
    start(servers, "b")
    servers.wait_ready()
    bursts = {"b": Burst(((3, 4), (5, 6)), 1), "a": Burst(((3, 4),), 2)}
    answers = asyncio.run(servers.send(bursts))
    errors = {name: [answer.error for answer in of] for name, of in answers.items()}
    assert errors == {"b": ["0 of 1 tokens came"] * 2, "a": ["0 of 2 tokens came"]}


def test_the_ends_of_all_logs_are_kept(servers: Servers, tmp_path: Path) -> None:
    start(servers, "a", "ends")
    servers["a"].process.wait()
    kept = tmp_path / "kept"
    kept.mkdir()
    servers.keep_logs(kept, "run")
    assert (kept / "run-a.log").read_text() == "core 0\nout of luck\n"


def test_without_a_ledger_that_is_said(servers: Servers) -> None:
    with pytest.raises(LedgerError, match="has 0 ledgers; one is needed"):
        servers.device()


def test_what_an_instance_holds_is_what_the_ledger_says(servers: Servers) -> None:
    path = ledger_directory(servers.directory) / "host.ledger"
    with Ledger(path, POOL) as ledger:
        row = ledger.register(name="a", engine="stand-in")
        ledger.promise(row, MIB, MIB)
        ledger.settle(row, mapped_bytes=MIB, used_bytes=MIB, cached_bytes=0)
        assert servers.view("a").resident_bytes == servers.resident_bytes("a") == MIB
        assert servers.resident_bytes("b") == 0
        with pytest.raises(KeyError):
            servers.view("b")
