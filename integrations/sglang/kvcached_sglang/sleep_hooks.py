"""Sleeping and waking: what SGLang's memory saver gives at a release comes back as a promise.

The bytes that a wake will allocate are announced and asked for first. Where there is no room, the
call is refused before anything of the engine is touched, and the engine sleeps on.
"""

from contextlib import nullcontext
from typing import Any

from kvcached_core.errors import NoRoomError
from kvcached_patches.around import around
from kvcached_sglang.engine import engine

KV_CACHE, WEIGHTS, CUDA_GRAPH = ALL_TAGS = ("kv_cache", "weights", "cuda_graph")


@around
def saver_region(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `region` and `cuda_graph` of SGLang's memory saver: count what is allocated inside.

    Weights that yield are none of the memory saver's: they will lie in memory of ours.
    """
    ours = engine()
    tag = kwargs.get("tag", args[0] if args else CUDA_GRAPH)
    if ours is not None and ours.may_yield and tag == WEIGHTS:
        return nullcontext()
    region = original(self, *args, **kwargs)
    return region if ours is None else ours.saved.measured(tag, region)


@around
def release_memory_occupation(
    original: Any, self: Any, recv_req: Any, *args: Any, **kwargs: Any
) -> Any:
    """Wrap the handler of `/release_memory_occupation`: all pages but page 0 go back.

    So do all weights, where they yield. Copies of blocks end first: SGLang would end with them.
    """
    ours = engine()
    if ours is not None:
        ours.port.end_copies()
    answer = original(self, recv_req, *args, **kwargs)
    if ours is not None and KV_CACHE in _tags(recv_req):
        ours.empty()
    if ours is not None and WEIGHTS in _tags(recv_req):
        ours.activation.sleep()
    return answer


@around
def resume_memory_occupation(
    original: Any, self: Any, recv_req: Any, *args: Any, **kwargs: Any
) -> Any:
    """Wrap the handler of `/resume_memory_occupation`: room is made first, or it is refused.

    The scheduler's thread waits for neighbours here, for seconds at most; nothing runs meanwhile.
    Every rank comes here, and all of them do the same.
    """
    ours = engine()
    if ours is None:
        return original(self, recv_req, *args, **kwargs)
    tags = _tags(recv_req)
    awake = [tag for tag in tags if tag not in self.offload_tags]
    if awake:
        return _refused(f"kvcached: {', '.join(awake)} cannot be resumed: not released")
    try:
        with ours.room_to_wake(ours.saved.bytes_of(tags), has_weights=WEIGHTS in tags):
            return original(self, recv_req, *args, **kwargs)
    except NoRoomError as error:
        return _refused(str(error))


@around
def init_communicators(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap `init_communicators` of SGLang's front end: a refused wake is an error of its caller."""
    original(self, *args, **kwargs)
    make_refusable(self.resume_memory_occupation_communicator)


def make_refusable(communicator: Any) -> None:
    """Let calls through a communicator of SGLang's raise what the scheduler refuses them for."""
    engines: Any = type(communicator)

    class RefusableCommunicator(engines):
        async def __call__(self, obj: Any) -> Any:
            answers = await super().__call__(obj)
            reasons = [answer.rid for answer in answers if answer.rid]
            if reasons:
                raise ValueError("; ".join(reasons))
            return answers

    communicator.__class__ = RefusableCommunicator


def _refused(reason: str) -> Any:
    # SGLang's answer has no field for a reason; no answer of this kind belongs to a request.
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqOutput

    return ResumeMemoryOccupationReqOutput(rid=reason)


def _tags(recv_req: Any) -> tuple[str, ...]:
    return tuple(recv_req.tags or ALL_TAGS)
