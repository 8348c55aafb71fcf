"""What our wrappers change, one by one, around originals that record how they were called."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.configurations import configuration, parallel

from kvcached_core.errors import UnsupportedEngineError
from kvcached_core.memory.model_bytes import OTHER_BYTES
from kvcached_vllm import engine_hooks, worker_hooks
from kvcached_vllm.engine_hooks import MAX_TILE_TOKENS, executor_sleep, get_num_skipped_tokens
from kvcached_vllm.obstacles import can_serve
from kvcached_vllm.weights import static_bytes

pytestmark = pytest.mark.vllm


class Recorder:
    """An original that records its arguments."""

    def __init__(self, result: Any = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.result = result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((*args[1:], *kwargs.values()))
        return self.result


ELASTIC_POOL = SimpleNamespace(frees_late=True)


@pytest.mark.parametrize(
    ("pool", "num_skipped", "expected"),
    [
        (ELASTIC_POOL, 1000, 1000 - MAX_TILE_TOKENS),
        (ELASTIC_POOL, 100, 0),
        (SimpleNamespace(frees_late=False), 1000, 1000),
        (SimpleNamespace(), 1000, 1000),
    ],
    ids=["elastic", "elastic, just moved", "elastic, of a load", "vanilla"],
)
def test_blocks_in_front_of_a_window_are_kept_for_a_tile(
    pool: Any, num_skipped: int, expected: int
) -> None:
    manager = SimpleNamespace(block_pool=pool)
    original = Recorder(result=num_skipped)
    assert get_num_skipped_tokens(original)(manager, 1511) == expected
    assert original.calls == [(1511,)]


def snapshot(free_bytes: int) -> Any:
    return SimpleNamespace(total_memory=1000, free_memory=free_bytes)


@pytest.mark.parametrize(("free_bytes", "expected"), [(950, 900), (100, 100)])
def test_a_start_does_not_need_a_share_of_the_device_free(free_bytes: int, expected: int) -> None:
    original = Recorder(result=-1)
    request = worker_hooks.request_memory(original)
    cache_config = SimpleNamespace(gpu_memory_utilization=0.9)

    def init_device(_worker: Any) -> None:
        assert request(snapshot(free_bytes), cache_config) == expected

    worker = SimpleNamespace(vllm_config=configuration())
    worker_hooks.worker_init_device(init_device)(worker)
    assert original.calls == []
    assert request(snapshot(free_bytes), cache_config) == -1  # outside: vLLM's own answer


def test_what_is_not_served_keeps_vllms_rules() -> None:
    original = Recorder(result=-1)
    request = worker_hooks.request_memory(original)
    worker = SimpleNamespace(vllm_config=configuration(parallel_config=parallel(nnodes=2)))

    def init_device(_worker: Any) -> None:
        assert request(snapshot(100), SimpleNamespace(gpu_memory_utilization=0.9)) == -1

    worker_hooks.worker_init_device(init_device)(worker)
    assert not can_serve(worker.vllm_config)


@pytest.mark.parametrize(("given", "expected"), [(None, 800), (500, 500), (5000, 800)])
def test_the_virtual_size_comes_from_the_pool_and_a_given_size_lowers_it(
    monkeypatch: pytest.MonkeyPatch, given: int | None, expected: int
) -> None:
    monkeypatch.setenv("KVCACHED_HOST_POOL", "800")
    worker = SimpleNamespace(
        vllm_config=configuration(),
        parallel_config=parallel(),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=given),
        device=SimpleNamespace(type="cpu"),
    )
    original = Recorder(result=7)
    assert worker_hooks.worker_determine_available_memory(original)(worker) == 7
    assert worker.cache_config.kv_cache_memory_bytes == expected


def sleeper(message: str) -> Any:
    def sleep(_worker: Any, _level: int) -> None:
        raise AssertionError(message)

    return worker_hooks.worker_sleep(sleep)


def test_a_neighbour_that_grows_while_we_fall_asleep_does_no_harm() -> None:
    waited = []
    keeper = SimpleNamespace(wait=lambda: waited.append(True))
    worker = SimpleNamespace(kvcached=SimpleNamespace(keeper=keeper))
    sleeper("Memory usage increased after sleeping.")(worker, 1)
    assert waited == [True]
    with pytest.raises(AssertionError, match="other"):
        sleeper("other")(worker, 1)
    with pytest.raises(AssertionError, match="increased"):
        sleeper("Memory usage increased after sleeping.")(SimpleNamespace(), 1)


@pytest.mark.parametrize(("yields_weights", "level"), [(True, 1), (False, 2)])
def test_a_sleeping_engine_is_emptied_first_and_saves_no_weights_that_may_be_gone(
    *, yields_weights: bool, level: int
) -> None:
    order: list[Any] = []
    engine = SimpleNamespace(
        empty=lambda: order.append("empty"),
        activation=SimpleNamespace(sleep=lambda: order.append("weights")),
        yields_weights=yields_weights,
    )
    sleep = executor_sleep(lambda _self, level: order.append(level))
    sleep(SimpleNamespace(kvcached=engine), level=2)
    assert order == ["empty", level, "weights"]  # vLLM may read buffers of its own while it falls
    sleep(SimpleNamespace(), level=2)
    assert order[3:] == [2]


def plan_of(*tensors: Any) -> Any:
    return SimpleNamespace(kv_cache_tensors=list(tensors), num_blocks=4)


class Starting:
    """An engine core and its executor around our hook, between plan and allocation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.closed: list[bool] = []
        self.kvcached: Any = None
        self.engine = SimpleNamespace(place=self.place, close=lambda: self.closed.append(True))
        self.error: Exception | None = None
        self.model_executor = SimpleNamespace(collective_rpc=lambda *_: [2 << 20])
        self.allocate = Recorder()
        self.engine.port = SimpleNamespace(core=self)
        monkeypatch.setattr(engine_hooks, "_start_engine", lambda *_: self.engine)

    def place(self, *_: Any) -> None:
        if self.error is not None:
            raise self.error

    def start(self, plans: list[Any]) -> Any:
        initialize = engine_hooks.executor_initialize_from_config(self.allocate)

        def original(_core: Any, _config: Any) -> Any:
            initialize(self.model_executor, plans)
            return plans[0]

        return engine_hooks.engine_core_initialize_kv_caches(original)(self, object())


def test_a_model_without_a_kv_cache_starts_and_leaves_the_ledger(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = Starting(monkeypatch)
    with caplog.at_level("INFO"):
        plan = core.start([plan_of()])
    assert core.closed == [True]
    assert len(core.allocate.calls) == 1
    assert core.kvcached is core.model_executor.kvcached is plan.kvcached is None
    assert [text for text in caplog.messages if "no KV cache" in text] == caplog.messages


@pytest.mark.parametrize("switch", ["1", "auto"])
def test_a_layout_that_is_refused_after_the_sizing_never_gets_an_allocation_of_that_size(
    monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    monkeypatch.setenv("ENABLE_KVCACHED", switch)
    core = Starting(monkeypatch)
    core.error = UnsupportedEngineError("the layers differ")
    with pytest.raises(SystemExit, match=r"(?s)the layers differ.*set ENABLE_KVCACHED=0"):
        core.start([plan_of(object())])
    assert core.allocate.calls == []
    assert core.closed == [True]


def test_weights_are_known_from_their_files_or_from_the_shape(tmp_path: Any) -> None:
    shape = SimpleNamespace(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(tmp_path),
            hf_config=shape,
            dtype=SimpleNamespace(itemsize=2),
            revision=None,
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1),
        load_config=SimpleNamespace(download_dir=None),
        device_config=SimpleNamespace(device_type="cuda"),
    )
    by_shape = 2 * (static_bytes(config) - OTHER_BYTES)
    assert by_shape == pytest.approx(16.06e9, rel=0.01)  # Llama-3.1-8B
    (tmp_path / "a.safetensors").write_bytes(b"x" * 600)
    (tmp_path / "b.safetensors").write_bytes(b"x" * 400)
    (tmp_path / "old.bin").write_bytes(b"x" * 1000)
    assert static_bytes(config) == 500 + OTHER_BYTES


def test_a_draft_models_weights_count_as_well_and_a_models_own_only_once(tmp_path: Any) -> None:
    def model(name: str, num_bytes: int) -> Any:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * num_bytes)
        dtype = SimpleNamespace(itemsize=2)
        return SimpleNamespace(model=str(folder), hf_config={}, dtype=dtype, revision=None)

    target, draft = model("target", 1000), model("draft", 100)
    speculative = SimpleNamespace(draft_model_config=draft, draft_tensor_parallel_size=1)
    config = SimpleNamespace(
        model_config=target,
        parallel_config=SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1),
        load_config=SimpleNamespace(download_dir=None),
        device_config=SimpleNamespace(device_type="cuda"),
        speculative_config=speculative,
    )
    assert static_bytes(config) == 500 + 100 + OTHER_BYTES
    speculative.draft_model_config = target  # ngrams: the target is its own draft
    assert static_bytes(config) == 500 + OTHER_BYTES


def runners(table: torch.Tensor) -> list[Any]:
    """Return both model runners, as far as a step without requests reads blocks through them."""
    group = SimpleNamespace(block_table=SimpleNamespace(gpu=table))
    first = SimpleNamespace(
        input_batch=SimpleNamespace(block_table=SimpleNamespace(block_tables=[group]))
    )
    second = SimpleNamespace(block_tables=SimpleNamespace(input_block_tables=[table]))
    return [first, second]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("memory", [None, object()])
def test_a_step_without_requests_reads_no_block_of_past_ones(number: int, memory: Any) -> None:
    table = torch.tensor([[65, 66], [67, 0]], dtype=torch.int32)
    worker = SimpleNamespace(model_runner=runners(table)[number], kvcached=memory)
    read = []
    worker_hooks.worker_execute_dummy_batch(lambda _: read.append(table.clone()))(worker)
    assert bool(read[0].any()) == (memory is None)
