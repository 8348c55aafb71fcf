"""A worker's weights: taken over when they are loaded, given, and back before a step."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kvcached_core.config import CUDA, read_config
from kvcached_core.engine.leaving import close_with
from kvcached_core.memory.model_bytes import find_folder
from kvcached_core.memory.torch_device import architecture
from kvcached_core.weights.status import WeightStatus, merge
from kvcached_vllm import restart_hooks
from kvcached_vllm.graph_hooks import use_graph_pool
from kvcached_vllm.startup import startup
from kvcached_vllm.weight_obstacles import weight_obstacles
from kvcached_vllm.worker import inner_worker

if TYPE_CHECKING:
    from kvcached_core.memory.seats import Seat
    from kvcached_core.weights.key import Origin
    from kvcached_core.weights.own_annex import OwnAnnex
    from kvcached_core.weights.own_weights import OwnWeights
    from kvcached_core.weights.restart import Restart

logger = logging.getLogger("vllm.kvcached")

# Where a worker has its `OwnWeights`.
OURS = "kvcached_weights"
# What of vLLM keeps buffers of its runner, beside a model's modules.
PACKAGES = ("vllm.v1.attention", "vllm.v1.sample", "vllm.v1.worker")
# Rows for requests, filled with zeros when a request comes that needs its one: half a GiB.
FORGOTTEN = ("output_bin_counts", "prompt_bin_mask")


def yields_weights(vllm_config: Any) -> bool:
    """Return whether weights are given, too; if they should be and cannot, say why."""
    return startup.may_yield(read_config(), weight_obstacles(vllm_config))


@contextlib.contextmanager
def loading(worker: Any) -> Iterator[None]:
    """Let vLLM load weights so that they can be taken over, and do that where it can be done.

    On a CPU the kernels that hide a packed copy of weights are off from now on: those of oneDNN,
    and SGLang's. On a GPU vLLM's own allocator for sleep, which would keep the memory, is passed.
    """
    from kvcached_core.weights.own_annex import make_annex  # they import torch
    from kvcached_core.weights.restart import make_restart

    annex = make_annex(worker.device, read_config(), worker.vllm_config.model_config.model)
    if annex is not None and annex.graph_pool is not None:
        use_graph_pool(annex.graph_pool)
    restart = make_restart(read_config(), worker.device, _origin_of(worker), restart_hooks.PACKAGES)
    with contextlib.ExitStack() as undo:  # an engine in its caller's process may be tried again
        for each in (annex, restart):
            if each is not None:
                undo.callback(each.close)
        undo.callback(use_graph_pool, None)
        with _taking_allocations(worker), restart_hooks.restarting(restart):
            yield
        _take_over(worker, annex, restart)
        undo.pop_all()


@contextlib.contextmanager
def _taking_allocations(worker: Any) -> Iterator[None]:
    """Have vLLM's weights in plain memory of torch's while it loads them."""
    if worker.device.type != CUDA:
        from vllm import _custom_ops
        from vllm.model_executor.layers import utils

        _custom_ops._supports_onednn = False
        utils.check_cpu_sgl_kernel = lambda *_: False
        yield
    else:
        worker._maybe_get_memory_pool_context = lambda *_, **__: contextlib.nullcontext()
        try:
            yield
        finally:
            del worker._maybe_get_memory_pool_context


def _take_over(worker: Any, annex: "OwnAnnex | None", restart: "Restart | None") -> None:
    from kvcached_core.weights.own_weights import take_over  # it imports torch

    modules, origin_of = _modules(worker.model_runner), _origin_of(worker)
    weights = take_over(modules, worker.device, read_config(), origin_of, annex, restart=restart)
    setattr(worker, OURS, weights)
    if weights is not None:
        worker.kvcached_close_weights = close_with(worker, weights.close)


def move_buffers(worker: Any) -> None:
    """Let the large buffers of a worker go with its weights, before graphs are captured."""
    weights = weights_of(worker)
    if weights is not None and weights.annex is not None:
        weights.annex.move({"runner": worker.model_runner}, PACKAGES, FORGOTTEN)


def _modules(runner: Any) -> Mapping[str, Any]:
    """Return the model of a runner, and its drafter if it has one."""
    import torch

    modules = {"model": runner.get_model()}
    for name in ("drafter", "speculator"):  # of the first model runner, and of the second
        model: Any = getattr(getattr(runner, name, None), "model", None)
        drafter = model.unwrap() if hasattr(model, "unwrap") else model
        if isinstance(drafter, torch.nn.Module):
            modules["drafter"] = drafter
    return modules


def _origin_of(worker: Any) -> Callable[[str], "Origin"]:
    """Return what says where a worker's weights come from, and does not keep the worker."""
    return partial(_origin, worker.vllm_config, worker.rank, worker.device)


def _origin(settings: Any, worker_rank: int, device: Any, layout_digest: str) -> "Origin":
    from kvcached_core.weights.key import Origin, mark_files

    model, load, parallel = settings.model_config, settings.load_config, settings.parallel_config
    folder = find_folder(str(model.model), revision=model.revision, cache_dir=load.download_dir)
    draft = getattr(settings.speculative_config, "draft_model_config", None)
    draft_files = mark_files(find_folder(str(draft.model))) if draft is not None else ()
    tensor_parallel = parallel.tensor_parallel_size
    stage, rank = divmod(worker_rank, tensor_parallel)
    return Origin(
        model=str(model.model),
        revision=model.revision,
        load_format=str(load.load_format),
        files=(*mark_files(folder), *draft_files),
        seed=model.seed or 0,
        dtype=str(model.dtype),
        quantization=model.quantization,
        part="model" if draft is None else f"model, {draft.model}",
        tensor_parallel=(tensor_parallel, rank),
        pipeline_parallel=(parallel.pipeline_parallel_size, stage),
        engine=startup.engine,
        device=architecture(device),
        layout_digest=layout_digest,
    )


def own_bytes(worker: Any) -> int:
    """Return the bytes of a worker's weights that are on memory of ours."""
    weights = weights_of(worker)
    return 0 if weights is None else weights.num_bytes


def enter_weights(worker: Any, seat: "Seat") -> None:
    """Let the ledger count a worker's weights as its own."""
    weights = weights_of(worker)
    if weights is not None:
        weights.rank.join(seat)


def copy_weights(worker: Any) -> None:
    """Begin to copy a worker's weights to host memory, behind its start."""
    weights = weights_of(worker)
    if weights is not None:
        weights.end_start()
        weights.rank.begin_copy()


def leave_weights(worker: Any) -> None:
    """Give a worker's weights and their copy back; nothing runs on them any more."""
    weights = weights_of(worker)
    if weights is not None:
        setattr(worker, OURS, None)
        use_graph_pool(None)
        worker.kvcached_close_weights()


def weights_of(worker: Any) -> "OwnWeights | None":
    """Return a worker's weights if they are on memory of ours."""
    found: OwnWeights | None = getattr(inner_worker(worker), OURS, None)
    return found


def weight_status(worker: Any) -> WeightStatus | None:
    """Return how much of a worker's weights is there; vLLM's `collective_rpc` calls this."""
    weights = weights_of(worker)
    return None if weights is None else weights.rank.status()


def hold_weights(worker: Any, num_missing: int) -> WeightStatus:
    """Have all but the last pages of a worker's weights there; `collective_rpc` calls this."""
    weights: OwnWeights = getattr(inner_worker(worker), OURS)
    return weights.rank.hold(weights.rank.status().pages_without(num_missing))


def finish_weights(worker: Any) -> None:
    """See `EnginePort.finish_weights`: `collective_rpc` calls this in each worker."""
    weights = weights_of(worker)
    if weights is not None:
        weights.rank.arriving.finish()


def merged(statuses: Sequence[WeightStatus | None]) -> WeightStatus | None:
    """Return what holds for all workers; None if one of them keeps its own."""
    found = [status for status in statuses if status is not None]
    return merge(found) if found and len(found) == len(statuses) else None


def follow_weights(worker: Any, is_update: bool) -> None:  # noqa: FBT001  it has no keywords
    """See `OwnWeights.follow`; `collective_rpc` calls this."""
    weights = weights_of(worker)
    if weights is not None:
        weights.follow(is_update=is_update)
