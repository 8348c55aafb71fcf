"""Around weights that go: what keeps them, how they are loaded, and who finds them there."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers.configurations import parallel

from kvcached_core.ledger.ledger import Ledger
from kvcached_core.ledger.opening import ledger_directory
from kvcached_core.units import MIB
from kvcached_core.weights import own_annex, restart
from kvcached_core.weights.status import WeightStatus
from kvcached_vllm import elastic_weights, graph_hooks, weight_hooks, worker_hooks
from kvcached_vllm.elastic_weights import follow_weights, loading, merged, yields_weights
from kvcached_vllm.weight_obstacles import weight_obstacles
from kvcached_vllm.worker_hooks import worker_load_model

pytestmark = pytest.mark.vllm


def settings(**changes: Any) -> Any:
    values = {
        "parallel_config": parallel(),
        "offload_config": offload(),
        "weight_transfer_config": None,
        "load_config": SimpleNamespace(load_format="auto"),
        **changes,
    }
    return SimpleNamespace(**values)


class Worker:
    """What the hooks look at of vLLM's worker."""

    rank = 0
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(model="m"))

    def __init__(self, device: Any) -> None:
        self.device = SimpleNamespace(type=device) if isinstance(device, str) else device


def offload(*, gib: float = 0, group_size: int = 0) -> Any:
    return SimpleNamespace(
        uva=SimpleNamespace(cpu_offload_gb=gib),
        prefetch=SimpleNamespace(offload_group_size=group_size),
    )


REASONS = {
    "--enable-eplb": {"parallel_config": parallel(enable_eplb=True)},
    "one server for each rank": {"parallel_config": parallel(data_parallel_size=2)},
    "--cpu-offload-gb": {"offload_config": offload(gib=1.5)},
    "--offload-group-size": {"offload_config": offload(group_size=4)},
    "--weight-transfer-config": {"weight_transfer_config": object()},
    "--load-format ipc_cache": {"load_config": SimpleNamespace(load_format="ipc_cache")},
    "--engram-config": {"engram_config": object()},
}


@pytest.mark.parametrize("setting", REASONS)
def test_what_keeps_weights_is_said_in_one_line_with_its_setting(
    setting: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KVCACHED_WEIGHTS", "yield")
    with caplog.at_level(logging.WARNING, "vllm.kvcached"):
        assert not yields_weights(settings(**REASONS[setting]))
    (line,) = caplog.messages
    assert line.startswith("kvcached: elastic weights off: ")
    assert setting in line
    assert line.endswith("; elastic KV stays on")


def test_weights_yield_where_that_is_set_and_nothing_keeps_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(weight_obstacles(settings())) == []
    assert not yields_weights(settings())
    monkeypatch.setenv("KVCACHED_WEIGHTS", "yield")
    assert yields_weights(settings())
    assert caplog.messages == []


class Engine:
    """Records what happens around a call."""

    yields_weights = True

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.model_executor = self
        self.kvcached = self

    @contextmanager
    def awake(self) -> Iterator[None]:
        self.seen.append("awake")
        try:
            yield
        finally:
            self.seen.append("rest")

    def collective_rpc(self, function: Any, args: tuple[Any, ...]) -> None:
        assert function is follow_weights
        self.seen.append(args)


@pytest.mark.parametrize(
    ("method", "is_update"),
    [("reload_weights", True), ("update_weights", True), ("check_health", False)],
)
def test_a_call_from_outside_finds_all_weights_and_what_it_replaced_is_taken_over(
    method: str,
    is_update: bool,  # noqa: FBT001
) -> None:
    engine = Engine()
    call = weight_hooks.engine_core_collective_rpc(lambda _self, name: engine.seen.append(name))
    call(engine, method)
    assert engine.seen == ["awake", method, (is_update,), "rest"]


def test_a_call_that_fails_may_have_written_weights() -> None:
    engine = Engine()

    def fails(_self: Any, _method: Any) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        weight_hooks.engine_core_collective_rpc(fails)(engine, "reload_weights")
    assert engine.seen == ["awake", (True,), "rest"]


def test_what_uses_weights_beside_a_step_finds_them() -> None:
    engine = Engine()
    hook = weight_hooks.engine_core_uses_weights(lambda _self: engine.seen.append("lora"))
    hook(engine)
    assert engine.seen == ["awake", "lora", "rest"]


def test_an_engine_that_keeps_its_weights_is_left_alone() -> None:
    engine = Engine()
    engine.yields_weights = False
    weight_hooks.engine_core_uses_weights(lambda _self: None)(engine)
    weight_hooks.engine_core_collective_rpc(lambda _self, _method: None)(engine, "reload_weights")
    assert engine.seen == []


def test_only_where_all_ranks_have_weights_that_go_they_go() -> None:
    first, second = WeightStatus(8, 8, 64, is_copied=True), WeightStatus(6, 5, 64, is_copied=True)
    both = WeightStatus(8, 7, 64, is_copied=True, of_ranks=(first, second))
    assert merged([first, second]) == both
    assert merged([first, None]) is None
    assert merged([]) is None


def test_on_a_cpu_kernels_that_hide_weights_are_off_while_they_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    monkeypatch.setattr(_custom_ops, "_supports_onednn", True)
    monkeypatch.setattr(utils, "check_cpu_sgl_kernel", lambda *_: True)
    taken: list[Any] = []
    monkeypatch.setattr(elastic_weights, "_take_over", lambda *args: taken.append(args[:2]))
    worker = Worker("cpu")
    with loading(worker):
        assert not _custom_ops._supports_onednn
        assert not utils.check_cpu_sgl_kernel(16, 32, None)
        assert taken == []
    assert taken == [(worker, None)]  # buffers stay


def test_on_a_gpu_weights_pass_vllms_allocator_for_sleep_and_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Allocating(Worker):
        def _maybe_get_memory_pool_context(self, tag: str) -> Any:
            return tag

    monkeypatch.setattr(elastic_weights, "_take_over", lambda *_: None)
    worker = Allocating("cuda")
    with loading(worker):
        assert isinstance(worker._maybe_get_memory_pool_context(tag="weights"), nullcontext)
    assert worker._maybe_get_memory_pool_context(tag="kv_cache") == "kv_cache"


def test_a_load_that_fails_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic_weights, "_take_over", pytest.fail)
    worker = Worker("cuda")
    with pytest.raises(MemoryError), loading(worker):
        raise MemoryError
    assert vars(worker).keys() == {"device"}


def test_a_load_that_fails_keeps_no_copy_no_buffers_and_no_pool_of_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    annex, kept = Mock(graph_pool=(7, 7)), Mock()
    monkeypatch.setattr(own_annex, "make_annex", lambda *_: annex)
    monkeypatch.setattr(restart, "make_restart", lambda *_: kept)
    monkeypatch.setattr(elastic_weights, "_take_over", pytest.fail)
    worker = Worker("cuda")
    pools = []

    def fail() -> None:
        pools.append(graph_hooks._pool)
        raise MemoryError

    with pytest.raises(MemoryError), loading(worker):
        fail()
    assert [*pools, graph_hooks._pool] == [(7, 7), None]
    kept.close.assert_called_once_with()
    annex.close.assert_called_once_with()


def test_a_load_that_fails_announces_nothing_any_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {
        "KVCACHED_DIR": str(tmp_path / "kv"),
        "KVCACHED_HOST_POOL": "64MiB",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(worker_hooks, "can_serve", lambda _config: True)
    monkeypatch.setattr(worker_hooks, "yields_weights", lambda _config: True)
    monkeypatch.setattr(worker_hooks, "static_bytes", lambda _config: MIB)
    monkeypatch.setattr(worker_hooks, "loading", lambda _worker: nullcontext())
    announced: list[int] = []
    with Ledger(ledger_directory(tmp_path / "kv") / "host.ledger", 64 * MIB) as ledger:

        def fail(_worker: Any) -> None:
            announced.extend(view.static_bytes for view in ledger.view().instances)
            raise MemoryError("no weights")

        worker = Worker(torch.device("cpu"))
        with pytest.raises(MemoryError, match="no weights"):
            worker_load_model(fail)(worker)
        assert announced == [MIB]
        assert not ledger.view().instances


def test_on_a_host_room_is_made_for_weights_that_yield_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    announced: list[int] = []

    def arrive(_device: Any, _model: Any, static_bytes: int, *, may_yield: bool) -> Any:
        assert may_yield
        announced.append(static_bytes)
        return SimpleNamespace(shrink=announced.append, close=lambda: None)

    monkeypatch.setattr(worker_hooks, "can_serve", lambda _config: True)
    monkeypatch.setattr(worker_hooks, "device_of", lambda _worker: None)
    monkeypatch.setattr(worker_hooks, "static_bytes", lambda _config: 500)
    monkeypatch.setattr(worker_hooks, "loading", lambda _worker: nullcontext())
    monkeypatch.setattr(worker_hooks, "own_bytes", lambda _worker: 512)
    monkeypatch.setattr(worker_hooks, "startup", SimpleNamespace(arrive=arrive))
    for is_yielding, expected in ((False, []), (True, [500, 512])):
        monkeypatch.setattr(worker_hooks, "yields_weights", lambda _config, it=is_yielding: it)
        worker = Worker("cpu")
        worker_load_model(lambda _self: None)(worker)
        assert announced == expected
