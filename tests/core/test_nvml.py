"""NVML: what it says of a GPU, and what is said where it is missing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_core import control
from kvcached_core.cli.doctor import examine
from kvcached_core.config import Config
from kvcached_core.errors import BackendError
from kvcached_core.ledger import nvml
from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.memory.devices import cuda_device, host_device
from kvcached_core.units import GIB

GPU = "GPU-00000000-1111-2222-3333-444444444444"


class NVMLError(Exception):
    """Stands for pynvml's."""


class FakeNVML:
    """One GPU with 80 GiB, 70 of them free."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        self.free = 70 * GIB
        self.is_lost = False

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:  # noqa: N802  the library's name
        if name != GPU:
            raise NVMLError("not found")
        return name

    def nvmlDeviceGetMemoryInfo(self, _handle: object) -> Any:  # noqa: N802  the same
        if self.is_lost:
            raise NVMLError("GPU is lost")
        return SimpleNamespace(total=80 * GIB, free=self.free)

    def nvmlDeviceGetCpuAffinity(self, _handle: object, num_words: int) -> list[int]:  # noqa: N802
        if self.is_lost:
            raise NVMLError("not supported")
        return [0b101, 0, 1 << 63] + [0] * (num_words - 3)

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802  the same
        if self.is_lost:
            raise NVMLError("GPU is lost")
        return "580.1"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802  the same
        return 1

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:  # noqa: N802  the same
        return number

    def nvmlDeviceGetUUID(self, _number: int) -> str:  # noqa: N802  the same
        if self.is_lost:
            raise NVMLError("GPU is lost")
        return GPU

    def nvmlDeviceGetName(self, _handle: object) -> str:  # noqa: N802  the same
        return "Fake H200"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeNVML:
    fake = FakeNVML()
    monkeypatch.setattr(nvml, "_nvml", lambda: fake)
    return fake


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(ledger_directory(tmp_path / "kv") / f"{GPU}.ledger", 78 * GIB) as ledger:
        row = ledger.register(name="llama", engine="vLLM 0.26.0")
        ledger.promise(row, 10 * GIB, GIB)
        ledger.settle(row, mapped_bytes=8 * GIB, used_bytes=8 * GIB, cached_bytes=0)
        yield ledger


def free_bytes(ledger: Ledger) -> int:
    (device,) = control.devices(ledger.path.parent)
    return device.free_bytes


def test_the_tools_show_what_strangers_leave_of_a_gpu(gpu: FakeNVML, ledger: Ledger) -> None:
    assert free_bytes(ledger) == 68 * GIB  # 2 of 70 are promised
    gpu.free = 20 * GIB
    assert free_bytes(ledger) == 18 * GIB
    gpu.free = 80 * GIB
    assert free_bytes(ledger) == 68 * GIB  # never more than the capacity allows


def test_the_tools_do_without_nvml(ledger: Ledger, missing_nvml: Callable[[], None]) -> None:
    missing_nvml()
    assert free_bytes(ledger) == 68 * GIB


@pytest.fixture
def missing_nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse() -> None:
        raise BackendError("nvmlInit", "no driver", 0)

    return lambda: monkeypatch.setattr(nvml, "_nvml", refuse)


def test_an_unknown_gpu_is_named(gpu: FakeNVML) -> None:
    with pytest.raises(BackendError, match="NVML, device GPU-other"):
        nvml.free_memory_reader("GPU-other")


def test_the_doctor_names_driver_and_gpus(gpu: FakeNVML, tmp_path: Path) -> None:
    found = {finding.what: finding for finding in examine(tmp_path / "kv")}
    assert found["GPU"].text == "driver 580.1: Fake H200 (70 GiB free)"


def test_the_doctor_says_that_there_is_no_gpu(
    missing_nvml: Callable[[], None], tmp_path: Path
) -> None:
    missing_nvml()
    found = {finding.what: finding for finding in examine(tmp_path / "kv")}
    assert found["GPU"].is_good
    assert "engines here share host memory" in found["GPU"].text


def test_a_gpu_that_does_not_answer_has_nothing_free_and_one_warning_says_so(
    gpu: FakeNVML, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    with Ledger(ledger.path, free_bytes=nvml.free_memory_reader(GPU)) as engine:
        row = engine.view().instances[0].row
        gpu.is_lost = True
        for _ in range(3):
            assert engine.promise(row, GIB, GIB) == 0
            assert engine.room_bytes(row) == 0
        assert caplog.text.count("NVML does not say any more what is free on GPU-0000") == 1
        gpu.is_lost = False
        assert engine.promise(row, GIB, GIB) == GIB
        gpu.is_lost = True
        engine.promise(row, GIB, GIB)
        assert caplog.text.count("nothing counts as free there") == 2


def test_errors_of_the_doctors_questions_are_ours(gpu: FakeNVML) -> None:
    gpu.is_lost = True
    with pytest.raises(BackendError, match=r"nvmlSystemGetDriverVersion failed: GPU is lost"):
        nvml.driver_version()
    with pytest.raises(BackendError, match="NVML, GPU 0 failed: GPU is lost"):
        list(nvml.gpus())


def test_the_processors_near_a_gpu_are_those_that_nvml_says(gpu: FakeNVML) -> None:
    device = cuda_device(GPU, 80 * GIB)
    assert device.near_cpus() == {0, 2, 191}
    gpu.is_lost = True
    assert device.near_cpus() == set()


def test_nobody_knows_of_near_processors_without_nvml_or_on_the_host(
    missing_nvml: Callable[[], None],
) -> None:
    missing_nvml()
    assert cuda_device(GPU, 80 * GIB).near_cpus() == set()
    assert host_device(Config(host_pool=GIB)).near_cpus() == set()
