"""How the ranks of a SGLang server share its work, and which of it is served."""

from collections.abc import Iterator
from typing import Any

from kvcached_core.engine.joining import Group
from kvcached_core.engine.start import is_first_rank
from kvcached_sglang.speculating import REMOVE, algorithm_of

# What SGLang drafts by on its last stage, if SGLANG_ENABLE_PP_SPEC says so: one method, two names.
DRAFTS_OF_STAGES = ("EAGLE", "NEXTN")

ONE_ATTENTION_RANK = "set --attn-dp-size 1"


def has_ranks(arguments: Any) -> bool:
    """Return whether several ranks serve the model, each with requests of its own."""
    num_replicas: int = getattr(arguments, "dp_size", 1)
    return num_replicas > 1 or num_attention_ranks(arguments) > 1


def num_attention_ranks(arguments: Any) -> int:
    """Return how many ranks with requests of their own compute each step together."""
    if getattr(arguments, "enable_dp_attention", False):  # until SGLang has resolved it
        return max(getattr(arguments, "dp_size", 1), getattr(arguments, "attn_dp_size", 1))
    return int(getattr(arguments, "attn_dp_size", 1))


def has_stages(arguments: Any) -> bool:
    """Return whether each rank has some of the layers, and works behind the one before it."""
    return bool(getattr(arguments, "pp_size", 1) > 1)


def num_attention_parts(arguments: Any) -> int:
    """Return how many ranks share the heads of a layer."""
    num_ranks: int = arguments.tp_size
    return num_ranks // num_attention_ranks(arguments)


def num_alike(arguments: Any) -> int:
    """Return how many ranks have the same requests: those of an instance."""
    return num_attention_parts(arguments) * int(getattr(arguments, "pp_size", 1))


def group_of(arguments: Any) -> Group:
    """Return the ranks that have the same requests: those of a stage, or of all stages."""
    from sglang.srt.distributed import parallel_state

    are_stages = has_stages(arguments)
    if are_stages:
        group = parallel_state.get_world_group()
    elif num_attention_ranks(arguments) > 1:
        group = parallel_state.get_attn_tp_group()
    else:
        group = parallel_state.get_tp_group()
    return Group(group.rank_in_group, group.ranks, group.cpu_group, are_stages)


def speaks_for_instance() -> bool:
    """Return whether this is the first one of the ranks that have the same requests."""
    if is_first_rank():
        return True
    from sglang.srt.distributed import parallel_state

    group = parallel_state.get_attn_tp_group()
    has_others = group.world_size < parallel_state.get_tp_group().world_size
    return has_others and bool(group.rank_in_group == 0)


def data_rank_of(runner: Any) -> int:
    """Return which of the ranks that share no requests has this runner, from 0 on."""
    owner = getattr(runner, "ps", runner)  # the runner's up to 0.5.15, and again in 0.5.21
    if not hasattr(owner, "dp_rank"):
        from sglang.srt.runtime_context import get_parallel

        owner = get_parallel()
    return owner.dp_rank or 0


def parallel_obstacles(arguments: Any) -> Iterator[str]:
    """Yield why ranks of these arguments cannot be served, and what to change.

    Args:
        arguments: What was parsed, or a `ServerArgs`.
    """
    if getattr(arguments, "elastic_ep_backend", None) not in (None, "none"):
        yield "elastic expert parallelism: ranks come and go; remove --elastic-ep-backend"
    if getattr(arguments, "enable_memory_saver", False):
        for setting, kind in _kinds(arguments):
            yield f"{kind} with --enable-memory-saver: nobody has tried it; set {setting} 1"
    if has_stages(arguments) and algorithm_of(arguments) not in (None, *DRAFTS_OF_STAGES):
        yield (
            "pipeline parallelism with --speculative-algorithm: SGLang itself serves EAGLE alone "
            f"there; set --speculative-algorithm EAGLE, {REMOVE}, or set --pp-size 1"
        )
    if num_attention_ranks(arguments) == 1:
        return
    if not hasattr(arguments, "attn_dp_size"):
        yield (
            "data-parallel attention: nobody has tried it with this release; install SGLang "
            "0.5.23, or remove --enable-dp-attention"
        )
    if has_stages(arguments):
        yield (
            "data-parallel attention with pipeline parallelism: nobody has tried it; "
            f"{ONE_ATTENTION_RANK}, or set --pp-size 1"
        )


def _kinds(arguments: Any) -> Iterator[tuple[str, str]]:
    """Yield the settings of ranks that do not all share each step, and what each is called."""
    if num_attention_ranks(arguments) > 1:
        yield "--attn-dp-size", "data-parallel attention"
    elif has_ranks(arguments):
        yield "--dp-size", "data parallelism"
    if has_stages(arguments):
        yield "--pp-size", "pipeline parallelism"
