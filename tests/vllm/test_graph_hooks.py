"""vLLM captures its graphs in a pool of ours while one of its workers has that, and not longer."""

from collections.abc import Iterator
from typing import Any

import pytest
import vllm.platforms
from vllm.platforms.interface import Platform

from kvcached_vllm.graph_hooks import platform_get_global_graph_pool, use_graph_pool

pytestmark = pytest.mark.vllm

OURS, THEIRS = (0, 7), (1, 0)


class Device(Platform):
    """A platform whose pools can be told from ours."""

    def graph_pool_handle(self) -> Any:
        return THEIRS


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    hooked = platform_get_global_graph_pool(Platform.get_global_graph_pool)
    monkeypatch.setattr(Device, "get_global_graph_pool", hooked, raising=False)
    monkeypatch.setattr(Device, "_global_graph_pool", None)
    found = Device()
    monkeypatch.setattr(vllm.platforms, "current_platform", found)
    yield found
    use_graph_pool(None)


def test_graphs_are_captured_in_ours_while_there_is_one(device: Device) -> None:
    use_graph_pool(OURS)
    assert device.get_global_graph_pool() == OURS
    assert device.get_global_graph_pool() == OURS
    use_graph_pool(None)
    assert device.get_global_graph_pool() == THEIRS


def test_without_one_vllm_makes_its_own(device: Device) -> None:
    assert device.get_global_graph_pool() == THEIRS


def test_a_pool_that_vllm_has_chosen_stays(device: Device) -> None:
    thrown_away = (2, 0)  # while it looks what graphs take
    use_graph_pool(OURS)
    Device._global_graph_pool = thrown_away
    assert device.get_global_graph_pool() == thrown_away
    use_graph_pool(None)
    assert Device._global_graph_pool == thrown_away


def test_a_second_engine_of_a_process_has_a_pool_of_its_own(device: Device) -> None:
    use_graph_pool(OURS)
    device.get_global_graph_pool()
    second = (0, 9)
    use_graph_pool(second)
    assert device.get_global_graph_pool() == second
