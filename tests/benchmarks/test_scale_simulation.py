"""The simulated cluster loses no request and no memory, and its day is the log's."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from scale.cluster import Device, Model, State
from scale.inputs import DAY_SECONDS, Assumptions, Day, read_measured
from scale_simulation import simulate

from kvcached_core.units import GIB

ASSUMED = replace(Assumptions(), host_bytes=700 * GIB)


def test_all_requests_are_answered_and_all_memory_is_counted() -> None:
    world = simulate(216, 16, ASSUMED, seed=1, seconds=3_600.0, drain_seconds=7_200.0)
    total = world.tally.report()["total"]
    assert isinstance(total, dict)
    assert total["requests"] == total["answered"] > 1_000
    assert total["starts"] > 0
    assert total["wakes"] > 0
    assert total["stops"] > 0
    for device in world.devices:
        check_device(device, [model for model in world.models if model.device is device])


def check_device(device: Device, models: list[Model]) -> None:
    awake_bytes = sum(model.weights_bytes for model in models if model.is_awake)
    residue_bytes = len(models) * read_measured().residue_bytes
    assert device.free_bytes == read_measured().device_bytes - awake_bytes - residue_bytes
    assert set(device.idle) == {model.number for model in models if model.is_awake}
    assert all(model.state is not State.COLD for model in models)


def test_the_host_never_holds_more_than_it_has() -> None:
    world = simulate(216, 16, ASSUMED, seed=2, seconds=1_800.0)
    for node in {device.node.number: device.node for device in world.devices}.values():
        copies = sum(model.copy_bytes(ASSUMED.process_bytes) for model in node.up.values())
        assert node.host_free_bytes >= 0
        assert copies <= ASSUMED.host_bytes


def test_the_same_seed_is_the_same_day() -> None:
    first, second = (
        simulate(54, 8, ASSUMED, seed=3, seconds=1_800.0).tally.report() for _ in range(2)
    )
    assert (first["total"], first["ttft_seconds"]) == (second["total"], second["ttft_seconds"])


def test_a_day_is_in_order_and_each_tenant_asks_its_models_as_the_log_does() -> None:
    day = Day(27, Assumptions(mean_plays=3.0), random.Random(4))
    (tenant,) = day.tenants
    requests = list(day.requests())
    assert [one.at for one in requests] == sorted(one.at for one in requests)
    assert requests[0].at >= 0
    assert requests[-1].at < DAY_SECONDS
    assert len(requests) == pytest.approx(tenant.num_plays * len(day.log), rel=0.01)
    tokens = Counter[int]()
    for one in requests:
        tokens[one.model] += one.num_in + one.num_out
    for model, rate in enumerate(day.tokens_per_second()):
        assert tokens[model] == pytest.approx(rate * DAY_SECONDS, rel=0.5, abs=3_000)


def test_more_comes_by_day_than_by_night() -> None:
    day = Day(27, Assumptions(), random.Random(5))
    (tenant,) = day.tenants
    hours = Counter(int(one.at // 3_600) for one in day.requests())
    peak = int(tenant.peak_seconds // 3_600)
    assert hours[peak % 24] > 3 * hours[(peak + 12) % 24]
