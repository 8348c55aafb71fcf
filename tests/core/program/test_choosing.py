"""Which devices a program uses, by what it is told and by its environment."""

import pytest

from kvcached_core.config import Config
from kvcached_core.errors import BackendError, ConfigError
from kvcached_core.ledger import nvml
from kvcached_core.program.choosing import choose_devices, environment
from kvcached_core.units import GIB

FIRST, SECOND, PART = "GPU-aaaa-1", "GPU-bbbb-2", "MIG-cccc-3"
SIZES = {FIRST: 80 * GIB, SECOND: 40 * GIB, PART: 10 * GIB}
CONFIG = Config(host_pool=GIB)


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a driver with two different GPUs, and a part of one that no list names."""
    monkeypatch.setattr(nvml, "gpu_uuids", lambda: (FIRST, SECOND))
    monkeypatch.setattr(nvml, "gpus", lambda: iter([("large", 0), ("small", 0)]))
    monkeypatch.setattr(nvml, "total_memory", SIZES.__getitem__)


def chosen(*named: str, **environ: str) -> list[str]:
    return [device.name for device in choose_devices(named, environ, CONFIG)]


@pytest.mark.parametrize(
    ("named", "found"),
    [
        (("1",), [SECOND]),
        ((FIRST,), [FIRST]),
        (("GPU-bb",), [SECOND]),
        (("1", "0", SECOND), [SECOND, FIRST]),
        ((PART,), [PART]),
        (("host",), ["host"]),
    ],
)
def test_a_device_is_named_by_number_or_uuid(named: tuple[str, ...], found: list[str]) -> None:
    assert chosen(*named, CUDA_VISIBLE_DEVICES="0") == found


@pytest.mark.parametrize("name", ["2", "GPU-", "GPU-cc", "cuda:0", "-1", ""])
def test_a_device_that_is_not_there_is_named_with_those_that_are(name: str) -> None:
    known = f"there are 0, 1, {FIRST}, {SECOND}, host"
    with pytest.raises(ConfigError, match=f"--device='{name}' is not there; {known}"):
        chosen(name)


@pytest.mark.parametrize(
    ("visible", "found"),
    [(FIRST, FIRST), ("GPU-b", SECOND), (PART, PART), ("", "host"), ("-1", "host")],
)
def test_the_only_device_that_is_visible_is_the_one(visible: str, found: str) -> None:
    assert chosen(CUDA_VISIBLE_DEVICES=visible) == [found]


def test_numbers_count_as_cuda_counts_them() -> None:
    with pytest.raises(ConfigError, match="counts GPUs by their speed"):
        chosen(CUDA_VISIBLE_DEVICES="1")
    assert chosen(CUDA_VISIBLE_DEVICES="1", CUDA_DEVICE_ORDER="PCI_BUS_ID") == [SECOND]


def test_equal_gpus_have_the_same_numbers_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "gpus", lambda: iter([("large", 0), ("large", 0)]))
    assert chosen(CUDA_VISIBLE_DEVICES="1") == [SECOND]


def test_where_several_are_visible_one_has_to_be_named() -> None:
    for environ in ({}, {"CUDA_VISIBLE_DEVICES": f"{FIRST},{SECOND}"}):
        with pytest.raises(ConfigError, match=f"2 GPUs are visible; .* 1 \\({SECOND}\\)"):
            chosen(**environ)
    assert chosen(CUDA_VISIBLE_DEVICES=f"{SECOND},-1,{FIRST}") == [SECOND]


def test_without_a_driver_it_is_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> tuple[str, ...]:
        raise BackendError("nvmlInit", "there is no driver", 12)

    monkeypatch.setattr(nvml, "gpu_uuids", fail)
    assert chosen() == chosen(CUDA_VISIBLE_DEVICES="0") == ["host"]


def test_a_program_sees_the_devices_that_were_named_for_it() -> None:
    devices = choose_devices(["1", "0"], {}, CONFIG)
    assert environment(devices, ["1", "0"]) == {"CUDA_VISIBLE_DEVICES": f"{SECOND},{FIRST}"}
    assert environment(devices, []) == {}
    assert environment(choose_devices(["host"], {}, CONFIG), ["host"]) == {
        "CUDA_VISIBLE_DEVICES": ""
    }
