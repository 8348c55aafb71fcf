"""What a program holds of a GPU: by its processes, or where they cannot be told, by what is new."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_core.config import Config
from kvcached_core.errors import NoRoomError
from kvcached_core.ledger import nvml
from kvcached_core.ledger.file import PROGRAM, RowKey
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.survey import survey
from kvcached_core.ledger.view import InstanceView
from kvcached_core.memory.devices import Device, cuda_device
from kvcached_core.program import held
from kvcached_core.program.held import held_reader
from kvcached_core.program.room import Room
from kvcached_core.units import GIB

GPU = "GPU-00000000-1111-2222-3333-444444444444"
TOTAL, HEADROOM = 80 * GIB, 2 * GIB
OURS, CHILD, STRANGER = 11, 12, 99


class NVMLError(Exception):
    """Stands for pynvml's."""


class FakeGpu:
    """A GPU whose processes have what a test says, under NVML's own names."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        self.compute: dict[int, int | None] = {}
        self.graphics: dict[int, int | None] = {}
        self.pages = self.unseen = 0  # of engines; of what no process list shows
        self.is_part = False

    @property
    def free(self) -> int:
        sizes = [size or 0 for size in (*self.compute.values(), *self.graphics.values())]
        return TOTAL - sum(sizes) - self.pages - self.unseen

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:  # noqa: N802  the library's name
        if name != GPU:
            raise NVMLError("not found")
        return name

    def nvmlDeviceGetMemoryInfo(self, _handle: object) -> Any:  # noqa: N802  the same
        return SimpleNamespace(total=TOTAL, free=self.free)

    def nvmlDeviceGetComputeRunningProcesses(self, _handle: object) -> Any:  # noqa: N802  the same
        return self._listed(self.compute)

    def nvmlDeviceGetGraphicsRunningProcesses(self, _handle: object) -> Any:  # noqa: N802  the same
        if self.is_part:
            raise NVMLError("not supported")
        return self._listed(self.graphics)

    def _listed(self, sizes: dict[int, int | None]) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in sizes.items()]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.setattr(nvml, "_nvml", lambda: fake)
    monkeypatch.setattr(held, "own_pid_namespace", lambda: held.FIRST_PID_NAMESPACE)
    return fake


@pytest.fixture
def contained(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """The same from a container, where NVML's process ids mean others."""
    monkeypatch.setattr(held, "own_pid_namespace", lambda: 4026532000)
    return gpu


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(dir=tmp_path / "kv", headroom=HEADROOM)


@pytest.fixture
def device(gpu: FakeGpu) -> Device:
    return cuda_device(GPU, nvml.total_memory(GPU))


@pytest.fixture
def room(device: Device, config: Config) -> Iterator[Room]:
    with Room([device], config, name="train", need="20GiB", priority=0) as made:
        assert made.make(0)
        made.begin()
        yield made


class Engine:
    """An engine beside the program."""

    def __init__(self, device: Device, config: Config, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.ledger = device.join_ledger(config)
        self.row: RowKey = self.ledger.register(name="llama", engine="test", page_bytes=GIB)

    def take(self, num_gib: int) -> int:
        """Map up to so much; return how much it was."""
        granted = self.ledger.promise(self.row, num_gib * GIB, GIB, is_waiting=True)
        self._gpu.pages += granted
        self.ledger.settle(self.row, mapped_bytes=granted, used_bytes=granted, cached_bytes=0)
        return granted // GIB

    def load(self, num_gib: int) -> None:
        """Allocate so much of what it has announced."""
        self._gpu.unseen += num_gib * GIB

    def announce(self, num_gib: int) -> None:
        self.ledger.announce(self.row, num_gib * GIB)


@pytest.fixture
def engine(device: Device, config: Config, gpu: FakeGpu, room: Room) -> Iterator[Engine]:
    made = Engine(device, config, gpu)
    yield made
    made.ledger.close()


def row(config: Config) -> InstanceView:
    (device,) = survey(config.dir).devices
    return next(one for one in device.instances if one.engine == PROGRAM)


def sizes(config: Config) -> tuple[float, float]:
    found = row(config)
    return found.resident_bytes / GIB, found.static_bytes / GIB


def test_its_room_shrinks_by_what_nvml_says_of_it_and_its_children(
    gpu: FakeGpu, room: Room, engine: Engine, config: Config
) -> None:
    assert sizes(config) == (0, 20)
    gpu.compute = {OURS: 5 * GIB, STRANGER: 30 * GIB}
    gpu.graphics = {CHILD: 3 * GIB}
    room.look([OURS, CHILD])
    assert sizes(config) == (8, 12)
    # 80 less 38 of processes, 2 of headroom, and the 12 that are announced still.
    assert engine.take(80) == 28
    gpu.compute = {OURS: 17 * GIB, STRANGER: 30 * GIB}
    room.look([OURS, CHILD])
    assert sizes(config) == (20, 0)
    assert engine.take(80) == 0


def test_what_is_allocated_and_not_seen_yet_is_nobody_elses(
    gpu: FakeGpu, room: Room, engine: Engine
) -> None:
    gpu.compute = {OURS: 20 * GIB}
    assert engine.take(80) == 80 - 20 - 2 - 20
    room.look([OURS])
    assert engine.take(80) == 20


def test_a_process_that_is_on_both_lists_counts_once(
    gpu: FakeGpu, room: Room, config: Config
) -> None:
    gpu.compute = gpu.graphics = {OURS: 6 * GIB}
    room.look([OURS])
    assert sizes(config) == (6, 14)


def test_a_part_of_a_gpu_has_no_graphics(gpu: FakeGpu, room: Room, config: Config) -> None:
    gpu.is_part = True
    gpu.compute = {OURS: 6 * GIB}
    room.look([OURS])
    assert sizes(config) == (6, 14)


def test_where_a_size_is_not_said_the_difference_is(
    gpu: FakeGpu, room: Room, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.compute, gpu.unseen = {OURS: None}, 9 * GIB
    for _ in range(2):
        room.look([OURS])
        assert sizes(config) == (9, 11)
    assert caplog.text.count("does not say what a process holds") == 1


def test_in_a_container_it_is_what_no_engine_accounts_for(
    contained: FakeGpu, room: Room, engine: Engine, config: Config
) -> None:
    contained.compute = {OURS: 7 * GIB}  # in the container this is another process
    room.look([OURS])
    assert sizes(config) == (7, 13)
    assert engine.take(10) == 10
    room.look([OURS])
    assert sizes(config) == (7, 13)


def test_in_a_container_what_an_engine_loads_beside_it_never_counts_as_the_programs(
    contained: FakeGpu, room: Room, engine: Engine, config: Config
) -> None:
    contained.unseen = 4 * GIB
    room.look([])
    assert sizes(config) == (4, 16)
    engine.announce(15)
    room.look([])
    engine.load(15)
    room.look([])
    assert sizes(config)[0] <= 4
    engine.announce(2)  # the rest is allocated
    room.look([])
    engine.ledger.unregister(engine.row)
    room.look([])
    assert sizes(config)[0] <= 4
    before = sizes(config)[0]
    contained.unseen += 3 * GIB
    room.look([])
    assert sizes(config)[0] == before + 3  # what comes later is seen all the same


def test_in_a_container_more_than_it_needs_is_somebody_elses(
    contained: FakeGpu, room: Room, config: Config
) -> None:
    contained.unseen = 50 * GIB
    room.look([])
    assert sizes(config) == (20, 0)


def test_on_a_gpu_that_others_fill_it_is_refused_and_they_are_named(
    gpu: FakeGpu, device: Device, config: Config
) -> None:
    gpu.compute = {STRANGER: 70 * GIB}
    with (
        Room([device], config, name="train", need="20GiB", priority=0) as made,
        pytest.raises(NoRoomError, match=r"held by weights and other programs \(70 GiB\)"),
    ):
        made.make(0)


def test_it_joins_with_the_headroom_of_those_that_are_there(
    gpu: FakeGpu, device: Device, config: Config
) -> None:
    with Ledger(device.join_ledger(config).path, TOTAL - HEADROOM) as ledger:
        ledger.register(name="llama", engine="test")
        other = config.model_copy(update={"headroom": 0})
        with Room([device], other, name="train", need="78GiB", priority=0) as made:
            assert made.make(0)
        with pytest.raises(NoRoomError, match="all instances share 78 GiB there"):
            Room([device], other, name="train", need="79GiB", priority=0)


def test_the_host_counts_nothing_of_a_gpu(gpu: FakeGpu) -> None:
    host = Device("host", "host", GIB)
    read = held_reader(host, RowKey(0, 1), GIB, lambda: pytest.fail("not asked"))
    assert read([]) == 0
