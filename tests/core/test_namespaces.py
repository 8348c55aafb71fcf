"""One ledger and two PID namespaces: who lives is told by locks, so all see each other."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ledger_child
from helpers.containers import WITH_PROC, why_not
from helpers.ledger_child import PAGE
from helpers.waiting import await_that

from kvcached_core.ledger.opening import ledger_directory

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"no namespaces: {why_not()}")

CAPACITY = 12
CLI = "from kvcached_core.cli.app import main; main()"


class Isolated:
    """An instance whose process is number 1 of a PID namespace of its own."""

    def __init__(self, path: Path, name: str) -> None:
        script = [sys.executable, ledger_child.__file__, str(path), str(CAPACITY * PAGE), name]
        self.process = subprocess.Popen(
            [*WITH_PROC, *script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.receive()

    def receive(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def do(self, operation: str, num: int = 0) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([operation, num]) + "\n")
        self.process.stdin.flush()
        return self.receive()

    def end(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        self.process.communicate()


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Isolated, Isolated]]:
    path = ledger_directory(tmp_path / "kv") / "host.ledger"
    first, second = Isolated(path, "first"), Isolated(path, "second")
    yield first, second
    for one in (first, second):
        one.end(signal.SIGKILL)


def hold(one: Isolated, num_pages: int) -> None:
    assert one.do("promise", num_pages) == num_pages
    assert one.do("map", num_pages) == num_pages


def test_each_sees_the_other_alive_although_both_are_process_1(
    both: tuple[Isolated, Isolated],
) -> None:
    hold(both[0], 8)
    hold(both[1], 3)
    for one in both:
        assert one.do("see") == [["first", 1, 8], ["second", 1, 3]]
    assert both[1].do("promise", 2) == 1, "what the first one has is counted"


def test_the_memory_of_one_that_was_killed_is_free_for_the_other(
    both: tuple[Isolated, Isolated],
) -> None:
    first, second = both
    hold(first, 8)
    hold(second, 3)
    first.end(signal.SIGKILL)
    promised = [second.do("promise", CAPACITY)]

    def has_all() -> bool:
        promised.append(second.do("promise", CAPACITY - 3 - sum(promised)))
        return sum(promised) == CAPACITY - 3

    await_that(has_all)
    assert second.do("see") == [["second", 1, 3]]
    assert second.do("map", CAPACITY) == CAPACITY - 3


def test_a_command_in_a_third_namespace_sees_both(
    both: tuple[Isolated, Isolated], tmp_path: Path
) -> None:
    hold(both[0], 8)
    command = [sys.executable, "-c", CLI, "list", "--dir", str(tmp_path / "kv")]
    done = subprocess.run([*WITH_PROC, *command], capture_output=True, text=True, check=True)
    assert [line.split("\t")[1] for line in done.stdout.splitlines()] == ["first", "second"]
