"""Says what is in a SGLang scheduler's prefix cache, as a plugin that its processes find.

Nothing of SGLang is imported before it calls us.
"""

import json
import os
from array import array
from functools import wraps
from pathlib import Path
from typing import Any

FOLDER = "TREE_REPORTS_FOLDER"
QUESTION, REPORT = "question.json", "report.json"


def register() -> None:
    """Answer in each turn of a scheduler's loop, be it paused or not."""
    from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

    original = SchedulerRequestReceiver.recv_requests

    @wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        from kvcached_sglang.engine import engine

        ours = engine()
        if ours is not None and ours.port.scheduler is not None:
            answer(ours.port.scheduler.tree_cache)
        return original(self, *args, **kwargs)

    SchedulerRequestReceiver.recv_requests = wrapper


def answer(tree_cache: Any) -> None:
    """Write how much of each prompt that was asked about is cached, and how much of all."""
    folder = Path(os.environ[FOLDER])
    question = folder / QUESTION
    if not question.exists():
        return
    prompts = json.loads(question.read_text())
    question.unlink()
    write(folder / REPORT, report_of(tree_cache, prompts))


def report_of(tree_cache: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Return how much of each prompt is cached, and how much there is at all."""
    size = tree_cache.total_size()
    return {
        "num_found": [num_found(tree_cache, prompt) for prompt in prompts],
        "num_tokens": size[0] if isinstance(size, tuple) else size,
    }


def num_found(tree_cache: Any, prompt: list[int]) -> int:
    """Return how many tokens of a prompt are cached."""
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    found = tree_cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", prompt), None)))
    if hasattr(found, "device_indices"):
        return len(found.device_indices)
    return len(tree_cache.path_device_indices(found.last_device_node))


def write(file: Path, content: Any) -> None:
    """Have a file appear with all that is in it."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(file)
