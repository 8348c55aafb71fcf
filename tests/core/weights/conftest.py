"""The devices that a rank's weights lie on: a host, and a GPU whose driver is a fake."""

from typing import Any, cast

import pytest
from helpers.fake_driver import FakeDriver, tensors_on_the_host
from helpers.weight_ranks import PAGE

from kvcached_core.memory.vmm.backend import Backend
from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.memory.vmm.host import HostBackend


@pytest.fixture
def granularity_bytes() -> int:
    return PAGE


@pytest.fixture
def driver(granularity_bytes: int, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    tensors_on_the_host(monkeypatch)
    return FakeDriver(granularity_bytes=granularity_bytes)


@pytest.fixture(params=["host", "cuda"])
def backend(request: pytest.FixtureRequest, granularity_bytes: int, driver: FakeDriver) -> Backend:
    if request.param == "host":
        return HostBackend(granularity_bytes)
    return CudaBackend(api=cast("Any", driver))
