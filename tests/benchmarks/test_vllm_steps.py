"""Which engines the benchmark of steps compares."""

from types import SimpleNamespace

import pytest
from vllm_steps import switches_of

pytestmark = pytest.mark.vllm


def options(*, no_control: bool = True, also: list[list[str]] | None = None) -> SimpleNamespace:
    return SimpleNamespace(no_control=no_control, page_sizes=["16MiB"], also=also or [])


def test_vanilla_comes_first_and_a_control_is_vanilla_too() -> None:
    switches = switches_of(options(no_control=False))
    assert list(switches) == ["vanilla", "control", "pages-16MiB"]
    assert switches["vanilla"] == switches["control"] == {"ENABLE_KVCACHED": "0"}


def test_another_elastic_engine_has_its_own_settings() -> None:
    calm = ["calm", "KVCACHED_IDLE_SECONDS=10", "KVCACHED_MIN_SPARE_PAGES=4"]
    assert switches_of(options(also=[calm]))["calm"] == {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_IDLE_SECONDS": "10",
        "KVCACHED_MIN_SPARE_PAGES": "4",
    }
