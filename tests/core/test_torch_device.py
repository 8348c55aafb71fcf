"""Devices by torch's names: the host, a GPU by its index, and the one that is current."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcached_core.config import CUDA, HOST, read_config
from kvcached_core.memory import torch_device
from kvcached_core.memory.vmm import cuda
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_core.units import GIB

CURRENT = 3


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch have GPUs, of which the one with the index `CURRENT` is the current one."""

    def index_of(device: Any) -> int:
        return CURRENT if device.index is None else int(device.index)

    def properties(device: Any) -> Any:
        return SimpleNamespace(uuid=f"uuid-{index_of(device)}", total_memory=GIB)

    def stream(device: Any) -> Any:
        return SimpleNamespace(cuda_stream=100 + index_of(device))

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CURRENT)
    monkeypatch.setattr(cuda, "CudaBackend", lambda index, **_: f"backend of {index}")
    torch_device._gpu_backend.cache_clear()
    yield
    torch_device._gpu_backend.cache_clear()


def test_the_host_has_one_device_and_one_stream() -> None:
    host = torch.device("cpu")
    config = read_config({"KVCACHED_HOST_POOL": "1GiB"})
    assert torch_device.find_device(host, config).kind == HOST
    assert isinstance(torch_device.make_backend(host), HostBackend)
    assert torch_device.current_stream(host)() == 0
    assert torch_device.with_index(host) == host


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("name", "index"), [("cuda:0", 0), ("cuda:1", 1), ("cuda", CURRENT)])
def test_a_gpu_without_an_index_is_the_current_one(name: str, index: int) -> None:
    gpu = torch.device(name)
    found = torch_device.find_device(gpu, read_config({}))
    assert (found.kind, found.name, found.total_bytes) == (CUDA, f"GPU-uuid-{index}", GIB)
    assert str(torch_device.make_backend(gpu)) == f"backend of {index}"
    assert torch_device.make_backend(gpu) is torch_device.make_backend(gpu)
    assert torch_device.current_stream(gpu)() == 100 + index
    assert torch_device.with_index(gpu) == torch.device("cuda", index)
