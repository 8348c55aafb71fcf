"""Weights of a SGLang scheduler: which stay, how others become ours, and who wakes them first."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.sglang_elastic import hooked, let_schedule, make_allocator, make_engine
from helpers.waiting import await_that
from sglang.srt.managers import io_struct

from kvcached_core.config import read_config
from kvcached_core.errors import NoRoomError
from kvcached_core.ledger.view import InstanceView
from kvcached_core.units import MIB
from kvcached_core.weights import scratch
from kvcached_core.weights.addresses import who_keeps_addresses
from kvcached_core.weights.binding import collect
from kvcached_sglang import hooks, start_hooks
from kvcached_sglang.elastic_weights import begin_to_yield, may_yield, take_over_weights
from kvcached_sglang.engine import SglangEngine
from kvcached_sglang.obstacles import SHARED_FORMATS, WEIGHT_OBSTACLES
from kvcached_sglang.weight_hooks import ANSWERS, UPDATES, use_weights

pytestmark = pytest.mark.sglang

YIELD = read_config({"KVCACHED_WEIGHTS": "yield"})
# What is not its default, where it is not a switch.
VALUES = {
    "cpu_offload_gb": 4,
    "pp_size": 2,
    "offload_group_size": 2,
    "startup_weight_load_mode": "overlap",
    "weight_cache_mode": "client",
}


def arguments(**others: Any) -> Any:
    return SimpleNamespace(**{"load_format": "auto"} | others)


# Which stay


def test_weights_yield_only_where_the_settings_say_so() -> None:
    assert may_yield(arguments(), YIELD)
    assert not may_yield(arguments(), read_config({"KVCACHED_WEIGHTS": "keep"}))


@pytest.mark.parametrize(
    "named",
    [
        *({name: VALUES.get(name, True)} for name in WEIGHT_OBSTACLES),
        *({"load_format": name} for name in SHARED_FORMATS),
    ],
    ids=lambda named: next(iter(named)),
)
def test_what_moves_weights_or_keeps_their_addresses_switches_them_off_in_one_line(
    named: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not may_yield(arguments(**named), YIELD)
    (line,) = caplog.messages
    assert line.startswith("kvcached: elastic weights off: ")
    assert line.endswith("; elastic KV stays on")
    (name,) = named
    assert f"-{name.replace('_', '-')}" in line or name.startswith("remote_instance")


def test_experts_that_sglang_pages_stay_since_it_copies_them_to_addresses_that_nobody_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = pytest.importorskip("sglang.srt.layers.moe.paged_experts.store").HostExpertStore
    kernels = "sglang.kernels.ops.moe.paged_experts.paged_experts_host_device_pointer"
    monkeypatch.setattr(kernels, torch.Tensor.data_ptr)  # its own needs a GPU
    layer = torch.nn.Module()
    layer.w13_weight = torch.nn.Parameter(torch.zeros(4, 8, 8))
    layer.store = store(layer, ["w13_weight"], 8, pin=False)
    layer.store.pin = True
    layer.store.bind_device_gather(layer)
    assert int(layer.store._gather_args[1]) == layer.w13_weight.data_ptr()
    assert who_keeps_addresses({"model": layer}, collect({"model": layer})) is None
    assert not may_yield(arguments(enable_paged_experts=True), YIELD)


def test_settings_that_are_their_defaults_switch_nothing_off() -> None:
    defaults = {name: allowed for name, (allowed, _) in WEIGHT_OBSTACLES.items()}
    assert may_yield(arguments(**defaults), YIELD)
    assert may_yield(arguments(**dict.fromkeys(defaults)), YIELD)


# How they become ours


class Model(torch.nn.Module):
    """Two pages of 2 MiB and a bit."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1024, 1024)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def runner(model: Model) -> Any:
    """A model runner, with a table of requests that is a buffer and one that is not."""
    table = torch.full((MIB // 4,), 3, dtype=torch.int32)
    return SimpleNamespace(
        device="cpu",
        model=model,
        server_args=SimpleNamespace(load_format="auto", download_dir=None, random_seed=None),
        model_config=SimpleNamespace(model_path="m", dtype="float32", quantization=None),
        req_to_token_pool=SimpleNamespace(req_to_token=table, free_slots=torch.zeros(MIB)),
    )


@pytest.fixture
def engine(
    tmp_path: Path,
    model: Model,
    runner: Any,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[SglangEngine]:
    """An engine without requests, whose weights were copied; a parameter is about its buffers."""
    monkeypatch.setattr(scratch, "LEAST_SCRATCH_BYTES", MIB)
    made = make_engine(
        tmp_path / "kv",
        host_pool=64 * MIB,
        page_bytes=2 * MIB,
        weights="yield",
        weights_dir=str(tmp_path / "weights"),
        weights_kept_seconds=0,
        buffers=getattr(request, "param", "keep"),
    )
    group = SimpleNamespace(ranks=[0], rank_in_group=0)
    with patch("sglang.srt.distributed.parallel_state.get_tp_group", lambda: group):
        take_over_weights(made, runner)
    allocator = make_allocator(made, 1000)
    let_schedule(made, SimpleNamespace(evict=None, evictable_size=lambda: 0))
    made.port.num_cached_blocks = lambda _number: 0  # type: ignore[method-assign]
    made.port.scheduler.weight_updater = SimpleNamespace(_session=None)
    begin_to_yield(made, runner)
    assert made.own_weights is not None
    rank = made.own_weights.rank
    await_that(lambda: rank.status().is_copied)
    yield made
    model.layer.weight = model.layer.bias = None  # type: ignore[assignment]
    del allocator
    made.own_weights.close()
    made.close()


def row(engine: SglangEngine) -> InstanceView:
    (ledger,) = engine.ranks.instance._ledgers.values()  # type: ignore[union-attr]
    return next(one for one in ledger.view().instances if one.name == "m")


def turn(engine: SglangEngine) -> None:
    engine.before_schedule()
    engine.after_schedule(has_batch=False)


def sleep(engine: SglangEngine) -> None:
    turn(engine)
    engine.sleep()
    assert row(engine).weights_bytes == 0


def test_weights_are_the_engines_own_in_the_ledger_and_offered_while_it_idles(
    engine: SglangEngine,
) -> None:
    assert engine.own_weights is not None
    size = engine.own_weights.num_bytes
    assert (size, row(engine).weights_bytes, row(engine).static_bytes) == (6 * MIB, 6 * MIB, 0)
    turn(engine)
    assert row(engine).weights_offered_bytes == size


def test_weights_are_kept_while_somebody_writes_to_them_in_several_calls(
    engine: SglangEngine,
) -> None:
    engine.port.scheduler.weight_updater._session = "open"
    turn(engine)
    assert row(engine).weights_offered_bytes == 0
    engine.port.scheduler.weight_updater._session = None
    turn(engine)
    assert row(engine).weights_offered_bytes > 0


# Who wakes them first


class Updater:
    """A part of SGLang's scheduler, whose methods say what they found."""

    def __init__(self, engine: SglangEngine, model: Model) -> None:
        self._engine = engine
        self._model = model

    def get_weights_by_name(self, name: str) -> float:
        assert name == "layer.weight"
        assert row(self._engine).weights_offered_bytes == 0
        return float(self._model.layer.weight.detach().sum())

    def update_weights_from_disk(self, _request: Any = None) -> None:
        self._model.layer.weight = torch.nn.Parameter(torch.ones(1024, 1024))


def use(engine: SglangEngine, model: Model, method: str, *args: Any) -> Any:
    with hooked(engine, (Updater, method, use_weights)):
        return getattr(Updater(engine, model), method)(*args)


def test_who_reads_weights_finds_them_and_they_are_offered_again(
    engine: SglangEngine, model: Model
) -> None:
    expected = float(model.layer.weight.detach().sum())
    sleep(engine)
    assert use(engine, model, "get_weights_by_name", "layer.weight") == expected
    assert row(engine).weights_offered_bytes == row(engine).weights_bytes == 6 * MIB


def test_weights_that_an_update_put_in_their_place_come_back_after_a_sleep(
    engine: SglangEngine, model: Model
) -> None:
    place = model.layer.weight.data_ptr()
    sleep(engine)
    use(engine, model, "update_weights_from_disk")
    assert model.layer.weight.data_ptr() == place
    sleep(engine)
    assert use(engine, model, "get_weights_by_name", "layer.weight") == 1024 * 1024


def test_weights_whose_addresses_were_captured_again_stay_there(
    engine: SglangEngine, model: Model
) -> None:
    place = model.layer.weight.data_ptr()
    request = SimpleNamespace(recapture_cuda_graph=True)
    use(engine, model, "update_weights_from_disk", request)
    assert model.layer.weight.data_ptr() != place
    sleep(engine)
    assert use(engine, model, "get_weights_by_name", "layer.weight") == 1024 * 1024
    assert model.layer.weight.data_ptr() != place


@pytest.mark.parametrize("method", sorted(ANSWERS))
def test_without_room_a_call_is_refused_with_the_reason_and_touches_nothing(
    engine: SglangEngine, method: str
) -> None:
    if not hasattr(io_struct, ANSWERS[method]):
        pytest.skip("this release has no such call")

    def refuse() -> None:
        raise NoRoomError("kvcached: there is no room for the weights")

    def call(_self: Any) -> None:
        pytest.fail("it is not called")

    call.__name__ = method
    with hooked(engine), patch.object(engine.activation, "activate_now", refuse):
        answer = use_weights(call)(None)
    assert type(answer) is getattr(io_struct, ANSWERS[method])
    if method == "get_weights_by_name":
        assert answer.parameter is None
    else:
        assert not answer.success
        assert "no room" in (getattr(answer, "error_message", None) or answer.message)


def test_what_has_no_answer_raises_where_there_is_no_room(engine: SglangEngine) -> None:
    def save_sharded_model(_self: Any) -> None:
        pytest.fail("it is not called")

    def refuse() -> None:
        raise NoRoomError("no room")

    with (
        hooked(engine),
        patch.object(engine.activation, "activate_now", refuse),
        pytest.raises(NoRoomError),
    ):
        use_weights(save_sharded_model)(None)


def test_updates_are_the_calls_that_write_all_weights() -> None:
    assert {
        "update_weights_from_disk",
        "update_weights_from_distributed",
        "update_weights_from_ipc",
        "update_weights_from_tensor",
        "end_weight_update",
    } == UPDATES


@pytest.mark.parametrize("what", ["nothing", "a batch in flight", "released"])
def test_a_paused_loop_answers_neighbours_if_nothing_is_in_flight_or_released(
    engine: SglangEngine, what: str
) -> None:
    scheduler = engine.port.scheduler
    scheduler._engine_paused = True
    scheduler.last_batch = "batch" if what == "a batch in flight" else None
    scheduler.weight_updater.offload_tags = {"weights"} if what == "released" else set()
    with hooked(engine):
        assert hooks.process_input_requests(lambda *_: "result")(scheduler, []) == "result"
    offered_bytes = row(engine).weights_offered_bytes
    assert offered_bytes == (6 * MIB if what == "nothing" else 0)


def test_a_health_check_is_answered_and_wakes_nothing(engine: SglangEngine) -> None:
    sleep(engine)
    scheduler, said = engine.port.scheduler, []
    scheduler.waiting_queue = [SimpleNamespace(rid="HEALTH_CHECK_1", http_worker_ipc="front")]
    scheduler.return_health_check_ipcs = []
    scheduler.maybe_send_health_check_signal = lambda: said.append(
        list(scheduler.return_health_check_ipcs)
    )
    with hooked(engine):
        assert hooks.get_next_batch_to_run(lambda _: None)(scheduler) is None
    assert said == [["front"]]
    assert scheduler.waiting_queue == []
    assert row(engine).weights_bytes == 0


# What goes with them


@pytest.mark.parametrize("engine", ["yield"], indirect=True)
def test_the_table_of_requests_goes_with_weights_and_comes_back(
    engine: SglangEngine, runner: Any
) -> None:
    weights, table = engine.own_weights, runner.req_to_token_pool.req_to_token
    assert weights is not None
    assert weights.annex is not None
    annex, status = weights.annex.annex, weights.rank.status()
    assert annex.resident_bytes == 2 * MIB
    assert row(engine).weights_bytes == sum(status.needed_bytes) == row(engine).weights_needed_bytes
    sleep(engine)
    assert (annex.resident_bytes, row(engine).weights_bytes) == (0, 0)
    engine.activation.activate_now()
    assert table.eq(3).all()
    assert row(engine).weights_bytes == sum(status.needed_bytes)


def test_buffers_stay_where_nobody_asked_for_it(engine: SglangEngine, runner: Any) -> None:
    assert engine.own_weights is not None
    assert engine.own_weights.annex is None
    address = runner.req_to_token_pool.req_to_token.data_ptr()
    sleep(engine)
    assert runner.req_to_token_pool.req_to_token.data_ptr() == address


class Capturing:
    """What captures graphs of a runner."""

    def __init__(self, runner: Any) -> None:
        self.model_runner = runner
        self.moved_before: list[bool] = []

    def capture(self) -> None:
        table = self.model_runner.req_to_token_pool.req_to_token
        self.moved_before.append(not table.untyped_storage().resizable())


@pytest.mark.parametrize("engine", ["yield"], indirect=True)
def test_buffers_are_moved_before_graphs_are_captured(engine: SglangEngine, runner: Any) -> None:
    runner.req_to_token_pool.req_to_token = torch.zeros(MIB // 4, dtype=torch.int32)
    capturing = Capturing(runner)
    with patch("kvcached_sglang.start_hooks.engine", lambda: engine):
        start_hooks.capture(Capturing.capture)(capturing)
    assert capturing.moved_before == [True]


def test_a_runner_of_vanilla_captures_as_it_does(runner: Any) -> None:
    capturing = Capturing(runner)
    start_hooks.capture(Capturing.capture)(capturing)
    assert capturing.moved_before == [False]
