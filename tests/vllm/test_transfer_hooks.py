"""What a connector is told of our memory, and what a step with copies waits for and checks."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from kvcached_core.errors import UnmappedBlockError, UnsupportedEngineError
from kvcached_core.memory.size_classes import SizeClass
from kvcached_patches.around import setting
from kvcached_vllm import transfer_hooks, worker_hooks
from kvcached_vllm.engine_hooks import engine_core_reset_prefix_cache
from kvcached_vllm.layout import PlaneLayout

pytestmark = pytest.mark.vllm

LAYOUT = PlaneLayout((SizeClass(64, 4),), ((0, 64),), is_one_allocation=False)
CONFIG = "vllm.distributed.kv_transfer.kv_connector.v1.offloading.config.build_offloading_config"


def step(*, loads: dict[int, Any] | None = None, stores: dict[int, Any] | None = None) -> Any:
    metadata = SimpleNamespace(load_jobs=loads or {}, store_jobs=stores or {})
    return SimpleNamespace(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(new_block_ids=[]),
        kv_connector_metadata=metadata,
    )


def job(*block_ids: int) -> Any:
    spec = SimpleNamespace(block_ids=list(block_ids))
    return SimpleNamespace(src_spec=spec, dst_spec=spec)


@pytest.mark.parametrize(("loads", "num_waits"), [({}, 0), ({5: job(1)}, 1)])
def test_a_step_waits_for_zeros_only_if_it_loads(loads: dict[int, Any], num_waits: int) -> None:
    memory = Mock(is_warming_up=False)
    execute = worker_hooks.worker_execute_model(lambda *_: None)
    execute(SimpleNamespace(kvcached=memory), step(loads=loads, stores={7: job(2)}))
    assert memory.backend.synchronize.call_count == num_waits


def test_debugging_checks_the_blocks_of_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCACHED_DEBUG", "1")

    def check(block_ids: Any) -> None:
        if wrong := [one for one in block_ids if one > 3]:
            raise UnmappedBlockError(str(wrong))

    memory = Mock(is_warming_up=False, check_blocks=check)
    execute = worker_hooks.worker_execute_model(lambda *_: "done")
    worker = SimpleNamespace(kvcached=memory)
    assert execute(worker, step(loads={5: job(1)}, stores={7: job(2, 3)})) == "done"
    for wrong in (step(loads={5: job(4)}), step(stores={5: job(1, 4)})):
        with pytest.raises(UnmappedBlockError, match=r"^\[4\]$"):
            execute(worker, wrong)


@pytest.mark.parametrize("has_plan", [True, False])
def test_memory_of_ours_lies_layer_by_layer(*, has_plan: bool) -> None:
    prefers = transfer_hooks.prefer_cross_layer_blocks(property(lambda _self: True))

    class Connector:
        prefer_cross_layer_blocks = prefers

    with setting(transfer_hooks.dense_plan, (None, LAYOUT) if has_plan else None):
        assert Connector().prefer_cross_layer_blocks is not has_plan


def test_a_connector_that_would_copy_other_bytes_ends_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, sparse = SimpleNamespace(num_bytes=256), SimpleNamespace(num_bytes=256)

    def build(_config: Any, plan: Any) -> Any:
        return SimpleNamespace(worker_kv_bytes_per_block=plan.num_bytes)

    monkeypatch.setattr(CONFIG, build)
    original = Mock()
    initialize = transfer_hooks.ensure_kv_transfer_initialized(original)
    config = SimpleNamespace(kv_transfer_config=object())
    with setting(transfer_hooks.dense_plan, (dense, LAYOUT)):
        initialize(config, sparse)
        original.assert_called_once_with(config, sparse)
        sparse.num_bytes = 64
        with pytest.raises(UnsupportedEngineError, match="64 bytes for the worker and 256 for"):
            initialize(config, sparse)


def test_without_a_plan_of_ours_a_connector_gets_vllms() -> None:
    original, plan = Mock(), object()
    transfer_hooks.ensure_kv_transfer_initialized(original)(SimpleNamespace(), plan)
    assert original.call_args.args[1] is plan


@pytest.mark.parametrize(
    ("transfers", "num_ends"),
    [(None, 0), (SimpleNamespace(kv_connector_worker_meta=None), 0), ("reports", 1)],
)
def test_reports_of_copies_come_with_a_steps_output(transfers: Any, num_ends: int) -> None:
    if transfers == "reports":
        transfers = SimpleNamespace(kv_connector_worker_meta="reports")
    copies = Mock()
    pool = SimpleNamespace(engine=SimpleNamespace(port=SimpleNamespace(copies=copies)))
    scheduler = SimpleNamespace(
        connector=object(), kv_cache_manager=SimpleNamespace(block_pool=pool)
    )
    update = transfer_hooks.scheduler_update_from_output(lambda *_: "outputs")
    step_output = SimpleNamespace(total_num_scheduled_tokens=7)
    output = SimpleNamespace(kv_connector_output=transfers)
    assert update(scheduler, step_output, output) == "outputs"
    assert copies.end.call_count == num_ends
    copies.computed.assert_called_once_with(7)
    copies.count.assert_called_once_with("outputs")


@pytest.mark.parametrize(
    "scheduler",
    [
        SimpleNamespace(connector=None),
        SimpleNamespace(
            connector=object(), kv_cache_manager=SimpleNamespace(block_pool=SimpleNamespace())
        ),
    ],
    ids=["without a connector", "with vLLM's own pool"],
)
def test_a_step_without_copies_of_ours_is_left_alone(scheduler: Any) -> None:
    update = transfer_hooks.scheduler_update_from_output(lambda *_: "outputs")
    assert update(scheduler, None, None) == "outputs"


@pytest.mark.parametrize("is_connector_reset", [True, False])
def test_a_reset_waits_for_copies_only_where_the_connector_forgets_them(
    *, is_connector_reset: bool
) -> None:
    engine, core = Mock(), SimpleNamespace()
    core.kvcached = engine
    reset = engine_core_reset_prefix_cache(lambda *_args, **_words: True)
    assert reset(core, reset_connector=is_connector_reset)
    names = [name for name, *_ in engine.mock_calls]
    expected = ["finish_copies", "port.copies.reset"] if is_connector_reset else []
    assert names == [*expected, "flush", "port.publish"]


def ending(num_preemptions: int = 0, num_computed: int = 8) -> tuple[Any, Any, Mock]:
    """Return a scheduler, a request of its that ends, and what our engine has to do with copies."""
    port = Mock()
    manager = SimpleNamespace(
        block_pool=SimpleNamespace(engine=SimpleNamespace(port=port)),
        get_block_ids=lambda name: f"blocks of {name}",
    )
    scheduler = SimpleNamespace(connector=Mock(), kv_cache_manager=manager)
    request = SimpleNamespace(
        request_id="it", num_preemptions=num_preemptions, num_computed_tokens=num_computed
    )
    return scheduler, request, port


@pytest.mark.parametrize(
    ("num_preemptions", "num_computed", "num_forgotten"), [(1, 0, 1), (1, 8, 0), (0, 0, 0)]
)
@pytest.mark.parametrize("is_later", [True, False])
def test_blocks_that_a_preempted_request_had_are_not_copied_when_it_is_aborted(
    monkeypatch: pytest.MonkeyPatch,
    num_preemptions: int,
    num_computed: int,
    num_forgotten: int,
    *,
    is_later: bool,
) -> None:
    monkeypatch.setattr(transfer_hooks, "find_spec", lambda _name: is_later or None)  # or 0.26
    finished = transfer_hooks.scheduler_connector_finished(lambda *_: "done")
    scheduler, request, _ = ending(num_preemptions, num_computed)
    assert finished(scheduler, request) == "done"
    asked = scheduler.connector.get_num_new_matched_tokens
    assert asked.call_count == (0 if is_later else num_forgotten)


def test_a_connector_forgets_what_a_window_left_while_its_request_still_has_the_rest() -> None:
    scheduler, request, port = ending()
    finished = transfer_hooks.scheduler_connector_finished(lambda *_: "done")
    assert finished(scheduler, request) == "done"
    port.left.forget_left.assert_called_once_with("it", "blocks of it")
    port.left = None
    assert finished(scheduler, request) == "done"


@pytest.mark.parametrize("has_engine", [True, False])
def test_the_end_of_a_request_is_vllms_own_without_copies_of_ours(
    monkeypatch: pytest.MonkeyPatch, *, has_engine: bool
) -> None:
    monkeypatch.setattr(transfer_hooks, "find_spec", lambda _name: None)
    scheduler, request, port = ending(num_preemptions=1, num_computed=0)
    scheduler.connector = None
    port.copies = None
    if not has_engine:
        del scheduler.kv_cache_manager.block_pool.engine
    finished = transfer_hooks.scheduler_connector_finished(lambda *_: "done")
    assert finished(scheduler, request) == "done"
    port.left.forget_left.assert_not_called()


@pytest.mark.parametrize("is_unfinished", [True, False])
@pytest.mark.parametrize("is_open", [True, False])
def test_an_engine_in_its_callers_process_is_not_done_while_copies_are_open(
    *, is_unfinished: bool, is_open: bool
) -> None:
    has_unfinished = transfer_hooks.llm_engine_has_unfinished_requests(lambda _self: is_unfinished)
    port = Mock(has_copies_to_end=lambda: is_open)
    client = SimpleNamespace(engine_core=SimpleNamespace(kvcached=SimpleNamespace(port=port)))
    assert has_unfinished(SimpleNamespace(engine_core=client)) is (is_unfinished or is_open)
    port.copies = None
    assert has_unfinished(SimpleNamespace(engine_core=client)) is is_unfinished


@pytest.mark.parametrize(
    "client", [SimpleNamespace(), SimpleNamespace(engine_core=SimpleNamespace())]
)
def test_other_engines_are_done_when_vllm_says_so(client: Any) -> None:
    has_unfinished = transfer_hooks.llm_engine_has_unfinished_requests(lambda _self: False)
    assert has_unfinished(SimpleNamespace(engine_core=client)) is False
