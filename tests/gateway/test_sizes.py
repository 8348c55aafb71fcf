"""What a start takes, as far as engines that ran have shown it."""

from pathlib import Path

import pytest
from helpers.gateway_ledger import row

from kvcached_core.units import GIB, MIB
from kvcached_gateway.control.machine import HOST_MEMORY, DeviceMemory, MachineView
from kvcached_gateway.control.sizes import ModelSize, Sizes, kept_bytes, reachable_bytes
from kvcached_gateway.settings.config import ModelSettings

A = ModelSettings(id="a", environment="e", model="/none")
KEPT = ModelSettings(id="k", environment="e", model="/none", when_idle="stop")
WIDE = ModelSettings(id="w", environment="e", model="/none", tensor_parallel=2)


def machine(device: DeviceMemory, **engines_bytes: int) -> MachineView:
    return MachineView({device.id: device}, 100 * GIB, engines_bytes, 0, 100 * GIB)


def gpu(free: int, *rows: object) -> DeviceMemory:
    return DeviceMemory("gpu", 80 * GIB, free, rows)  # type: ignore[arg-type]


def test_the_most_that_was_ever_seen_counts() -> None:
    sizes = Sizes()
    mine = row(
        name="a",
        resident_bytes=20 * GIB,
        weights_bytes=16 * GIB,
        weights_needed_bytes=16 * GIB,
        least_bytes=GIB,
        token_bytes=128,
    )
    sizes.learn([(A, ("gpu",))], machine(gpu(58 * GIB, mine), a=3 * GIB))
    sizes.learn([(A, ("gpu",))], machine(gpu(59 * GIB, mine), a=2 * GIB))
    assert sizes.of("a") == ModelSize(3 * GIB, 2 * GIB, 16 * GIB, GIB, 128)
    assert sizes.needed_bytes(A, ("gpu",)) == {HOST_MEMORY: 19 * GIB, "gpu": 19 * GIB}


def test_a_model_that_never_ran_takes_its_files_and_what_the_largest_other_has(
    tmp_path: Path,
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(2 * MIB))
    (tmp_path / "config.json").write_text("{}")
    new = ModelSettings(id="n", environment="e", model=str(tmp_path))
    sizes = Sizes()
    assert sizes.needed_bytes(new, ("gpu",)) == {HOST_MEMORY: 2 * MIB, "gpu": 2 * MIB}
    sizes.learn([(A, ("gpu",))], machine(gpu(79 * GIB, row(name="a")), a=3 * GIB))
    assert sizes.needed_bytes(new, ("gpu",)) == {
        HOST_MEMORY: 3 * GIB + 2 * MIB,
        "gpu": GIB + 2 * MIB,
    }


def test_weights_that_never_yield_have_no_copy_and_are_no_residue(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(64 * MIB))
    kept = KEPT.model_copy(update={"model": str(tmp_path)})
    sizes = Sizes()
    device = DeviceMemory("gpu", 1 * GIB, GIB - 80 * MIB, (row(name="k", least_bytes=0),))
    sizes.learn([(kept, ("gpu",))], machine(device, k=GIB))
    assert sizes.of("k").residue_bytes == 16 * MIB
    assert sizes.needed_bytes(kept, ("gpu",)) == {HOST_MEMORY: GIB, "gpu": 80 * MIB}


def test_the_copies_of_all_ranks_count_and_each_device_has_its_own_part() -> None:
    sizes = Sizes()
    ranks = row(
        name="w",
        resident_bytes=8 * GIB,
        weights_bytes=8 * GIB,
        weights_needed_bytes=8 * GIB,
        least_bytes=0,
    )
    devices = {name: DeviceMemory(name, 80 * GIB, 72 * GIB, (ranks,)) for name in ("one", "two")}
    sizes.learn([(WIDE, ("one", "two"))], MachineView(devices, GIB, {"w": GIB}, 0, GIB))
    assert sizes.needed_bytes(WIDE, ("one", "two")) == {
        HOST_MEMORY: 17 * GIB,
        "one": 8 * GIB,
        "two": 8 * GIB,
    }


def test_what_other_programs_had_before_is_no_residue() -> None:
    sizes = Sizes()
    before = DeviceMemory("gpu", None, 70 * GIB)  # no ledger says yet what there is
    assert sizes.others_bytes(before) == 0
    sizes.learn_others(machine(before))
    sizes.learn([(A, ("gpu",))], machine(gpu(68 * GIB, row(name="a"))))
    assert sizes.others_bytes(gpu(68 * GIB, row(name="a"))) == 10 * GIB
    assert sizes.of("a").residue_bytes == 2 * GIB


@pytest.mark.parametrize(
    ("idle", "soon", "reachable"),
    [
        ((), (), 10 * GIB),
        (("a",), (), 25 * GIB),
        (("b",), (), 10 * GIB),
        ((), ("a",), 26 * GIB),
    ],
)
def test_a_start_finds_what_is_free_and_what_idle_ones_give(
    idle: tuple[str, ...], soon: tuple[str, ...], reachable: int
) -> None:
    holder = row(
        name="a",
        resident_bytes=24 * GIB,
        weights_bytes=16 * GIB,
        weights_needed_bytes=16 * GIB,
        weights_offered_bytes=15 * GIB,
        idle_bytes=GIB,
        cached_bytes=3 * GIB,
        used_bytes=4 * GIB,
    )
    assert reachable_bytes(gpu(6 * GIB, holder), idle, soon) == reachable


def test_of_a_device_that_nobody_told_of_nothing_is_known() -> None:
    assert reachable_bytes(DeviceMemory("host", None, 0), ()) is None


def test_a_longest_request_that_never_fits_beside_the_weights_keeps_no_start_waiting() -> None:
    sizes = Sizes()
    alone = DeviceMemory("gpu", 24 * MIB, 24 * MIB)
    sizes.learn_others(machine(alone))
    mine = row(
        name="a",
        resident_bytes=14 * MIB,
        weights_bytes=10 * MIB,
        weights_needed_bytes=10 * MIB,
        least_bytes=20 * MIB,
    )
    sizes.learn([(A, ("gpu",))], machine(DeviceMemory("gpu", 24 * MIB, 10 * MIB, (mine,)), a=1))
    assert sizes.device_bytes(A) == 30 * MIB
    assert sizes.device_bytes_of(A, alone) == 24 * MIB
    assert sizes.device_bytes_of(A, DeviceMemory("wide", 40 * MIB, 40 * MIB)) == 30 * MIB
    # Weights that do not fit are not made to.
    assert sizes.device_bytes_of(A, DeviceMemory("gpu", 8 * MIB, 8 * MIB)) == 10 * MIB


@pytest.mark.parametrize("offered_bytes", [0, 10 * MIB])
def test_what_idle_engines_keep_is_what_a_start_cannot_reach(offered_bytes: int) -> None:
    mine = row(
        name="a",
        resident_bytes=20 * MIB,
        weights_bytes=10 * MIB,
        weights_needed_bytes=10 * MIB,
        weights_offered_bytes=offered_bytes,
        used_bytes=4 * MIB,
        cached_bytes=4 * MIB,
        idle_bytes=2 * MIB,
        promised_bytes=2 * MIB,
    )
    device = DeviceMemory("gpu", 40 * MIB, 18 * MIB, (mine,))
    assert kept_bytes(mine) == 16 * MIB - offered_bytes
    assert reachable_bytes(device, {"a"}) == 40 * MIB - kept_bytes(mine)
    assert kept_bytes(None) == 0
