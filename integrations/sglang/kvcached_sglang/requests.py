"""What we read of SGLang's requests, and how one goes back to the queue."""

from inspect import signature
from types import SimpleNamespace
from typing import Any


def num_computed(request: Any) -> int:
    """Return the tokens of a request whose keys and values are there."""
    if hasattr(request, "prefix_len"):
        return int(request.prefix_len)
    return len(request.prefix_indices)  # up to 0.5.15


def evictable_tokens(tree_cache: Any, number: int) -> int:
    """Return the tokens of the prefix cache that no request holds, in one of its pools.

    Args:
        tree_cache: SGLang's.
        number: 0 for the pool of all layers, 1 for that of sliding windows.
    """
    if number:
        return int(tree_cache.swa_evictable_size())
    if tree_cache.supports_mamba() or tree_cache.supports_swa():
        return int(tree_cache.full_evictable_size())  # up to 0.5.15 such a cache has no other name
    return int(tree_cache.evictable_size())


def is_asleep(scheduler: Any) -> bool:
    """Return whether something of the engine was released and not resumed."""
    owner = getattr(scheduler, "weight_updater", scheduler)  # its own up to 0.5.12
    return bool(getattr(owner, "offload_tags", ()))


def is_updating(scheduler: Any) -> bool:
    """Return whether somebody writes new weights in several calls, which only new releases have."""
    owner = getattr(scheduler, "weight_updater", None)
    return getattr(owner, "_session", None) is not None


def skip_health_checks(scheduler: Any) -> None:
    """Take SGLang's health checks out of the queue of a scheduler whose model is not there.

    A check is a request for one token, which would wait for the wake, or wake the engine. It is
    answered as SGLang answers one that comes while other requests are there.
    """
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

    for request in list(scheduler.waiting_queue):
        if request.rid.startswith(HEALTH_CHECK_RID_PREFIX):
            scheduler.waiting_queue.remove(request)
            scheduler.return_health_check_ipcs.append(request.http_worker_ipc)


def answer_health_checks(scheduler: Any) -> None:
    """Let SGLang's `/health` hear that a scheduler is alive which runs nothing."""
    if is_asleep(scheduler):
        skip_health_checks(scheduler)
    scheduler.maybe_send_health_check_signal()


def has_beams(request: Any) -> bool:
    """Return whether a request has several answers at once; SGLang computes no such one again."""
    return getattr(request, "beam_group", None) is not None


def num_beams_beside(request: Any) -> int:
    """Return for how many beams beside its own a request takes a token in each step."""
    return int(request.beam_group.num_member_rows) if has_beams(request) else 0


def give_up_part(scheduler: Any) -> None:
    """Send a prompt of which a part is computed back to the queue, and free that part."""
    from sglang.srt.managers import schedule_batch

    request, scheduler.chunked_req = scheduler.chunked_req, None
    if request is None:
        return
    options = {
        "remaing_req_count": 0,
        "req_to_token_pool": scheduler.req_to_token_pool,
        "token_to_kv_pool_allocator": scheduler.token_to_kv_pool_allocator,
        "tree_cache": scheduler.tree_cache,
        "hisparse_coordinator": None,
    }
    if hasattr(schedule_batch, "release_req"):
        release = schedule_batch.release_req
        if "server_args" in signature(release).parameters:  # up to 0.5.18
            options["server_args"] = scheduler.server_args
        release(req=request, **options)
    else:  # 0.5.12 has it for a request of a batch alone
        batch = SimpleNamespace(reqs=[request], **options)
        schedule_batch.ScheduleBatch.release_req(batch, 0, 0, scheduler.server_args)
    scheduler._add_request_to_queue(request, is_retracted=True)
