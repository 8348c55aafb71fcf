"""Speculative decoding: which of it is served, and what a batch takes of the pool for it."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

# Drafts of these have layers like the target's, or none at all.
SERVED_ALGORITHMS = ("EAGLE", "EAGLE3", "NEXTN", "NGRAM", "STANDALONE")
WITHOUT_A_MODEL = "NGRAM"

# A worker of older releases, which takes ids on trial: it puts back a list from before.
_TRYING_MODULE = "sglang.srt.speculative.eagle_worker"

REMOVE = "remove --speculative-algorithm"


def algorithm_of(arguments: Any) -> str | None:
    """Return what a server of these arguments drafts by; None where it does not."""
    found = getattr(arguments, "speculative_algorithm", None)
    return None if found is None else str(found).upper()


def has_draft_model(arguments: Any) -> bool:
    """Return whether a server of these arguments has a second model."""
    return algorithm_of(arguments) not in (None, WITHOUT_A_MODEL)


def draft_obstacles(arguments: Any) -> Iterator[str]:
    """Yield why a server's speculative decoding cannot be served, and what to change.

    Args:
        arguments: What was parsed, or a `ServerArgs`.
    """
    algorithm = algorithm_of(arguments)
    if algorithm is None:
        return
    if algorithm not in SERVED_ALGORITHMS:
        yield (
            f"speculative decoding by {algorithm}: nobody has tried it; set "
            f"--speculative-algorithm to one of {', '.join(SERVED_ALGORITHMS)}, or remove it"
        )
    elif find_spec(_TRYING_MODULE) is not None:
        yield (
            "speculative decoding: this release of SGLang takes ids on trial, and forgets pages "
            f"that were opened meanwhile; install a newer one, or {REMOVE}"
        )


def tokens_of_next_decode(batch: Any) -> int | None:
    """Return what the next step of a batch takes at most; None where it is a token a request."""
    algorithm = getattr(batch, "spec_algorithm", None)
    if algorithm is None or algorithm.is_none():
        return None
    return int(batch.new_tokens_required_next_decode())


def num_allocated(request: Any) -> int:
    """Return the tokens of a request for which there are ids, those of its next drafts too."""
    return int(getattr(request, "kv", request).kv_allocated_len)  # the request's own up to 0.5.15
