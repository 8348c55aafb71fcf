"""What a start takes, as far as engines that ran have shown it."""

import json
from pathlib import Path

import pytest
from helpers.gateway_ledger import row

from kvcached_core.ledger.file import PROGRAM
from kvcached_core.memory.model_bytes import OTHER_BYTES
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
    assert sizes.needed_bytes(A, [gpu(0)]) == {HOST_MEMORY: 19 * GIB, "gpu": 19 * GIB}


def new_model(folder: Path, **config: int) -> ModelSettings:
    """Write the files of a model that never ran: 2 MiB of weights."""
    (folder / "model.safetensors").write_bytes(bytes(2 * MIB))
    (folder / "config.json").write_text(json.dumps(config))
    return ModelSettings(id="n", environment="e", model=str(folder))


def test_a_model_that_never_ran_takes_its_files_and_what_the_largest_other_has(
    tmp_path: Path,
) -> None:
    new, sizes, host = new_model(tmp_path), Sizes(), DeviceMemory("host", GIB, GIB)
    assert sizes.needed_bytes(new, [gpu(0), host]) == {
        HOST_MEMORY: 2 * MIB,
        "gpu": OTHER_BYTES + 2 * MIB,
        "host": 2 * MIB,
    }
    sizes.learn([(A, ("gpu",))], machine(gpu(79 * GIB, row(name="a")), a=3 * GIB))
    assert sizes.needed_bytes(new, [gpu(0)]) == {
        HOST_MEMORY: 3 * GIB + 2 * MIB,
        "gpu": GIB + 2 * MIB,
    }


def test_the_longest_request_of_a_model_that_never_ran_is_as_its_configuration_and_arguments_say(
    tmp_path: Path,
) -> None:
    new = new_model(
        tmp_path,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=128,
        max_position_embeddings=1024,
    )
    token_bytes, host = 2 * 2 * 4 * 128 * 2, DeviceMemory("host", GIB, GIB)
    assert Sizes().device_bytes(new, host) == 2 * MIB + 1024 * token_bytes
    assert Sizes(lambda _model: 100).device_bytes(new, host) == 2 * MIB + 100 * token_bytes
    small = DeviceMemory("host", 3 * MIB, MIB)
    assert Sizes().device_bytes(new, small) == 2 * MIB
    sizes = Sizes()
    mine = row(name="n", weights_bytes=MIB, weights_needed_bytes=MIB, least_bytes=7 * MIB)
    sizes.learn([(new, ("host",))], machine(DeviceMemory("host", GIB, GIB, (mine,))))
    assert sizes.device_bytes(new, host) == 8 * MIB


def test_weights_that_never_yield_have_no_copy_and_are_no_residue(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(64 * MIB))
    kept = KEPT.model_copy(update={"model": str(tmp_path)})
    sizes = Sizes()
    device = DeviceMemory("gpu", 1 * GIB, GIB - 80 * MIB, (row(name="k", least_bytes=0),))
    sizes.learn([(kept, ("gpu",))], machine(device, k=GIB))
    assert sizes.of("k").residue_bytes == 16 * MIB
    assert sizes.needed_bytes(kept, [device]) == {HOST_MEMORY: GIB, "gpu": 80 * MIB}


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
    assert sizes.needed_bytes(WIDE, devices.values()) == {
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


def test_before_the_first_engine_told_what_the_host_s_pool_is_nobody_has_it_all() -> None:
    sizes = Sizes()
    sizes.learn_others(machine(DeviceMemory("host", None, 0)))
    mine = row(name="a", weights_bytes=2, weights_needed_bytes=2, resident_bytes=2, least_bytes=5)
    known = DeviceMemory("host", GIB, GIB - 2, (mine,))
    sizes.learn([(A, ("host",))], machine(known))
    assert sizes.others_bytes(known) == 0
    assert sizes.device_bytes(A, known) == 7


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
    alone = DeviceMemory("host", 24 * MIB, 24 * MIB)
    sizes.learn_others(machine(alone))
    mine = row(
        name="a",
        resident_bytes=14 * MIB,
        weights_bytes=10 * MIB,
        weights_needed_bytes=10 * MIB,
        least_bytes=20 * MIB,
    )
    sizes.learn([(A, ("host",))], machine(DeviceMemory("host", 24 * MIB, 10 * MIB, (mine,)), a=1))
    # It fits beside nobody, so nobody has to go for it.
    assert sizes.device_bytes(A, alone) == 10 * MIB
    assert sizes.needed_bytes(A, [alone])["host"] == 10 * MIB
    assert sizes.device_bytes(A, DeviceMemory("host", 30 * MIB, 24 * MIB)) == 10 * MIB
    assert sizes.device_bytes(A, DeviceMemory("wide", 40 * MIB, 40 * MIB)) == 30 * MIB
    assert sizes.device_bytes(A, DeviceMemory("host", None, 0)) == 30 * MIB
    # Weights that do not fit are not made to.
    assert sizes.device_bytes(A, DeviceMemory("host", 8 * MIB, 8 * MIB)) == 10 * MIB


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


def test_a_programs_room_is_others_whether_or_not_it_is_allocated() -> None:
    engine = row(name="a", resident_bytes=20 * GIB)
    sizes = Sizes()
    sizes.learn_others(machine(gpu(70 * GIB)))  # 10 are in use before anybody comes
    found = []
    for held in (0, 12):
        program = row(
            name="train",
            engine=PROGRAM,
            resident_bytes=held * GIB,
            weights_bytes=held * GIB,
            static_bytes=(20 - held) * GIB,
        )
        device = gpu((70 - 20 - 20 - 2) * GIB, engine, program)  # 2 are the engine's context
        sizes.learn([(A, ("gpu",))], machine(device))
        found.append((sizes.others_bytes(device), sizes.residue_bytes(A), device.programs_bytes))
    assert found == [(30 * GIB, 2 * GIB, 20 * GIB)] * 2
    assert sizes.device_bytes(A, device) <= 80 * GIB - 30 * GIB
    assert reachable_bytes(device, idle={"a", "train"}) == 28 * GIB
