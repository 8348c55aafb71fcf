"""A forked child owns nothing: it takes nothing from its parent, and keeps nothing of it alive."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.forked import exit_code_of_child
from helpers.waiting import PATIENCE_SECONDS, await_that

from kvcached_core.config import HOST, Config, read_config
from kvcached_core.engine.arrival import Arrival
from kvcached_core.engine.instance import Instance
from kvcached_core.errors import LedgerError
from kvcached_core.ledger.bell import Doorbell, ring
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.memory.devices import Device
from kvcached_core.units import MIB

PAGE = 16 * MIB
POOL = Device(HOST, "host", 8 * PAGE)

pytestmark = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return read_config({"KVCACHED_DIR": str(tmp_path / "kv")})


@pytest.fixture
def rang() -> threading.Event:
    return threading.Event()


@pytest.fixture
def instance(config: Config, rang: threading.Event) -> Iterator[Instance]:
    made = Instance([POOL], config, name="parent", default_name="", engine="test", on_ring=rang.set)
    made.describe(page_bytes=PAGE, num_pages=8)
    yield made
    made.close()


def names(config: Config) -> list[str]:
    with Ledger(config.dir / "host.ledger") as ledger:
        return [seen.name for seen in ledger.view().instances]


def test_a_child_that_closes_its_parents_engine_changes_nothing(
    config: Config, instance: Instance, rang: threading.Event
) -> None:
    arrival = Arrival(POOL, config, name="new", engine="test", static_bytes=PAGE)
    assert arrival.make_room()
    instance.promise(2, is_urgent=False)
    bell = instance._bells[0].path

    def close() -> None:
        instance.close()
        arrival.close()

    assert exit_code_of_child(close) == 0
    assert len(names(config)) == 2
    assert ring(bell)
    assert rang.wait(60)
    assert instance.promise(8, is_urgent=False) == 5
    instance.cancel(7)
    arrival.close()


def test_a_child_that_closes_its_parents_bell_leaves_it_ringing(tmp_path: Path) -> None:
    rang = threading.Event()
    bell = Doorbell(tmp_path / "a.sock", rang.set)
    assert exit_code_of_child(bell.close) == 0
    assert ring(bell.path)
    assert rang.wait(60)
    bell.close()


def test_a_child_that_ends_normally_changes_nothing(config: Config, tmp_path: Path) -> None:
    script = """
import atexit, os, sys
from pathlib import Path
from kvcached_core.config import HOST, read_config
from kvcached_core.memory.devices import Device
from kvcached_core.engine.instance import Instance
instance = Instance([Device(HOST, "host", 8 << 20)], read_config(), name="parent",
                    default_name="", engine="test", on_ring=lambda: None)
instance.describe(page_bytes=1 << 20, num_pages=8)
atexit.register(instance.close)
if os.fork() == 0:
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
print(instance.promise(3, is_urgent=True), instance._bells[0].path.exists())
"""
    environ = {**os.environ, "KVCACHED_DIR": str(config.dir)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 True\n", "")
    assert list(config.dir.iterdir()) == []


def test_a_child_may_not_use_what_its_parent_opened(instance: Instance) -> None:
    def use() -> None:
        for call in (
            lambda: instance.promise(1, is_urgent=True),
            instance.wanted_pages,
            lambda: instance.cancel(1),
            instance.room_pages,
            lambda: instance.beside.make_room(PAGE, 0.0),
        ):
            with pytest.raises(LedgerError, match="a forked child owns nothing"):
                call()

    assert exit_code_of_child(use) == 0
    assert instance.promise(8, is_urgent=False) == 8


def test_a_child_may_have_an_engine_of_its_own(config: Config, instance: Instance) -> None:
    def start() -> None:
        own = Instance(
            [POOL], config, name="child", default_name="", engine="test", on_ring=lambda: None
        )
        own.describe(page_bytes=PAGE, num_pages=8)
        assert own.promise(8, is_urgent=False) == 6
        assert names(config) == ["parent", "child"]
        own.close()

    instance.promise(2, is_urgent=False)
    assert exit_code_of_child(start) == 0
    assert names(config) == ["parent"]


PARENT = """
import os, subprocess, sys, time
from pathlib import Path
from kvcached_core.ledger.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), 1 << 30)
row = ledger.register(name="parent", engine="test")
reader, writer = os.pipe()
if sys.argv[2] == "fork":
    pid = os.fork()
    if pid == 0:
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
else:
    pid = subprocess.Popen(["sleep", "60"], close_fds=False, stdin=subprocess.DEVNULL,
                           stdout=subprocess.DEVNULL).pid
ledger._enter_patiently()
print(pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["fork", "program"])
def test_a_child_keeps_neither_its_dead_parents_row_nor_its_lock(config: Config, how: str) -> None:
    config.dir.mkdir(mode=0o700)
    path = config.dir / "host.ledger"
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PARENT, str(path), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        with Ledger(path) as ledger:
            assert [seen.name for seen in ledger.view().instances] == ["parent"]
            assert not ledger._enter(0.0)
            parent.kill()
            parent.wait()
            await_that(lambda: ledger.view().instances == ())
            assert ledger.remove_if_unused()
    finally:
        os.kill(child, signal.SIGKILL)
        parent.communicate()


def test_a_fork_while_another_thread_has_the_lock_leaves_the_child_free_to_start(
    config: Config, instance: Instance
) -> None:
    ledger = next(iter(instance._ledgers.values()))
    taken, end = threading.Event(), threading.Event()

    def hold() -> None:
        ledger._enter_patiently()
        taken.set()
        end.wait(PATIENCE_SECONDS)
        ledger._exit()

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait(PATIENCE_SECONDS)

    def look() -> None:
        instance.close()
        assert names(config) == ["parent"]

    assert exit_code_of_child(look) == 0
    end.set()
    holder.join()
    assert instance.promise(1, is_urgent=False) == 1


def test_children_of_multiprocessing_leave_the_parents_row(
    config: Config, instance: Instance
) -> None:
    for method in ("fork", "spawn"):
        child = multiprocessing.get_context(method).Process(target=os.getpid)
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert names(config) == ["parent"]
        assert instance.promise(1, is_urgent=False) == 1
