"""What the gateway sees of devices and of the host's memory."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kvcached_core.config import Config
from kvcached_core.errors import BackendError, ConfigError, LedgerError
from kvcached_core.ledger import nvml
from kvcached_core.ledger.file import PROGRAM
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.units import GIB, MIB
from kvcached_core.weights.host_budget import HostBudget
from kvcached_gateway.control.machine import Machine, MachineView
from kvcached_gateway.engines.sessions import Identity

UUIDS = ("GPU-1", "GPU-2")
HOLD = """
import os, sys
held = bytearray(b"x") * (int(sys.argv[1]) << 20)
child = os.fork()
if child:
    print("ready", flush=True)
sys.stdin.read()
held[::4096] = bytes(len(held[::4096]))
"""


@contextmanager
def holding(num_mib: int) -> Iterator[Identity]:
    """Run a session of two processes that have so much memory each."""
    words = [sys.executable, "-c", HOLD, str(num_mib)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        yield Identity.of(process.pid)
        process.communicate()


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a driver that names two GPUs."""
    monkeypatch.setattr(nvml, "gpu_uuids", lambda: UUIDS)
    monkeypatch.setattr(nvml, "free_memory_reader", lambda _name: lambda: 7 * MIB)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no driver."""

    def fail() -> tuple[str, ...]:
        raise BackendError("nvmlInit", "there is no driver", 12)

    monkeypatch.setattr(nvml, "gpu_uuids", fail)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("devices", "names"),
    [("all", UUIDS), (("1",), ("GPU-2",)), (("GPU-1", "0"), ("GPU-1",)), (("host",), ("host",))],
)
def test_devices_are_known_by_their_ledgers_names(
    tmp_path: Path, devices: str | tuple[str, ...], names: tuple[str, ...]
) -> None:
    assert Machine(tmp_path, devices, None).names == names


@pytest.mark.usefixtures("two_gpus")
def test_a_device_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no 7; there are 0, 1, GPU-1, GPU-2, host"):
        Machine(tmp_path, ("0", "7"), None)


@pytest.mark.usefixtures("no_gpu")
def test_all_devices_of_a_machine_without_a_driver_are_its_host(tmp_path: Path) -> None:
    assert Machine(tmp_path, "all", None).names == ("host",)
    with pytest.raises(ConfigError, match="there is no 0; there are host"):
        Machine(tmp_path, ("0",), None)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_nobody_told_of_has_what_its_driver_says(tmp_path: Path) -> None:
    view = Machine(tmp_path, "all", 5 * MIB).look([])
    assert {name: each.free_bytes for name, each in view.devices.items()} == dict.fromkeys(
        UUIDS, 7 * MIB
    )
    assert view.numbers == {"GPU-1": "0", "GPU-2": "1"}
    assert (view.budget_bytes, view.free_host_bytes) == (5 * MIB, 5 * MIB)


@pytest.mark.usefixtures("no_gpu")
def test_engines_of_one_model_count_together_and_one_that_just_ended_counts_nothing(
    tmp_path: Path,
) -> None:
    with ExitStack() as stack:
        engines = [stack.enter_context(holding(4)) for _ in range(2)]
        gone = replace(engines[0], start_ticks=engines[0].start_ticks + 1)
        machine = Machine(tmp_path, "all", GIB)
        view = machine.look([("a", engines[0]), ("a", engines[1]), ("b", gone)])
        assert 2 * 2 * 4 * MIB < view.engines_bytes["a"] < GIB
        assert view.engines_bytes["b"] == 0
        assert view.free_host_bytes == GIB - view.engines_bytes["a"]
        assert machine.look([("a", engines[0])]).engines_bytes["a"] < view.engines_bytes["a"]
    assert view.available_bytes > 0
    assert view.problems == ()


@pytest.mark.usefixtures("no_gpu")
def test_the_budget_of_a_file_that_says_none_is_half_of_what_is_free(tmp_path: Path) -> None:
    view = Machine(tmp_path, "all", None).look([])
    assert view.budget_bytes == view.available_bytes // 2
    with holding(64) as engine:
        machine = Machine(tmp_path, "all", None)
        view = machine.look([("a", engine)])
        held_bytes = view.engines_bytes["a"]
        assert view.budget_bytes == (view.available_bytes + held_bytes) // 2
        assert view.free_host_bytes == view.budget_bytes - held_bytes
        assert machine.look([]).budget_bytes == view.budget_bytes


@pytest.mark.usefixtures("no_gpu")
def test_host_copies_count_wherever_an_environment_keeps_them_and_once(tmp_path: Path) -> None:
    folders = [ledger_directory(tmp_path / name) for name in ("kv", "fast", "large")]
    named = [Config(dir=folders[0]), *(Config(weights_dir=folder) for folder in folders[1:])]
    with ExitStack() as stack:
        for config in named:
            budget = HostBudget(config.model_copy(update={"host_budget": GIB}), GIB)
            stack.callback(budget.claim("llama", 3 * MIB).close)
        machine = Machine(folders[0], "all", GIB)
        assert machine.look([]).copies_bytes == 3 * MIB
        environs = [{"KVCACHED_WEIGHTS_DIR": str(each)} for each in (*folders[1:], folders[1])]
        assert machine.look([], [*environs, {"HOME": "/"}]).copies_bytes == 9 * MIB


def test_what_others_have_of_the_host_is_not_free_whatever_the_file_says() -> None:
    view = MachineView({}, 10 * GIB, {"a": GIB}, 0, 2 * GIB)
    assert view.free_host_bytes == 2 * GIB


@pytest.mark.usefixtures("no_gpu")
def test_instances_are_found_by_their_names_on_their_devices(tmp_path: Path) -> None:
    with Ledger(ledger_directory(tmp_path) / "host.ledger", GIB) as ledger:
        ledger.register(name="llama", engine="vLLM")
        view = Machine(tmp_path, "all", MIB).look([])
    assert view.devices["host"].capacity_bytes == GIB
    for devices in ((), ("host",)):
        (found,) = view.views("llama", devices)
        assert found.engine == "vLLM"
    assert not view.views("llama", ("gone",))
    assert not view.views("other")


@pytest.mark.usefixtures("no_gpu")
def test_a_broken_ledger_hides_no_device(tmp_path: Path) -> None:
    (ledger_directory(tmp_path) / "GPU-1.ledger").write_bytes(b"nonsense")
    view = Machine(tmp_path, "all", MIB).look([])
    assert view.devices["host"].free_bytes == 0
    (problem,) = view.problems
    assert "GPU-1.ledger" in problem


@pytest.mark.usefixtures("no_gpu")
def test_without_its_folder_nothing_is_known_of_any_device(tmp_path: Path) -> None:
    directory = ledger_directory(tmp_path / "kv")
    machine = Machine(directory, "all", MIB)
    assert machine.look([])
    directory.rmdir()
    with pytest.raises(LedgerError, match="kv' is gone"):
        machine.look([])


def test_a_driver_that_fails_says_so_and_is_no_empty_device(
    tmp_path: Path, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del two_gpus

    def fail() -> int:
        raise BackendError("nvmlDeviceGetMemoryInfo", "the GPU is lost", 15)

    monkeypatch.setattr(nvml, "free_memory_reader", lambda _name: fail)
    with pytest.raises(BackendError, match="the GPU is lost"):
        Machine(tmp_path, "all", MIB).look([])


@pytest.mark.usefixtures("no_gpu")
def test_the_room_of_a_program_is_taken_from_its_announcement_on(tmp_path: Path) -> None:
    with Ledger(ledger_directory(tmp_path / "kv") / "host.ledger", GIB) as ledger:
        row = ledger.register(name="train", engine=PROGRAM)
        ledger.announce(row, 100 * MIB)
        machine = Machine(tmp_path / "kv", "all", GIB)
        for held in (0, 60):
            ledger.settle_program(
                row,
                mapped_bytes=held * MIB,
                unmapped_bytes=0,
                announced_bytes=(100 - held) * MIB,
            )
            host = machine.look([]).devices["host"]
            assert (host.free_bytes, host.programs_bytes) == (GIB - 100 * MIB, 100 * MIB)
            assert (host.engines, host.unnamed_bytes) == ((), 100 * MIB)
