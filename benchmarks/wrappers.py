"""What our wrappers add to a call on the scheduler's path, beside what they do there.

    python benchmarks/wrappers.py --json benchmarks/results/wrappers.json

Each wrapper of ours gets a function that does nothing, and that function is called alone in turn.
Around a request or a step with nothing to do, that is all we cost.
"""

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from parts.machine import describe_machine
from parts.record import command_line, write

from kvcached_vllm import engine_hooks, transfer_hooks, worker_hooks
from kvcached_vllm.port import VllmPort

NUM_CALLS = 20_000
NUM_PAIRS = 31
CLOCK = time.thread_time  # what else runs on the machine does not count


class Owner:
    """Has what the wrappers look at, and nothing to do."""

    def __init__(self) -> None:
        port = VllmPort(self)
        self.block_pool = SimpleNamespace(
            engine=SimpleNamespace(end_schedule=lambda: None, port=port),
            giving=SimpleNamespace(owed_pages=0, weights=SimpleNamespace(is_active=True)),
            get_num_free_blocks=lambda: 8,
            num_groups=1,
        )
        self.kv_cache_manager = self
        self.kvcached = SimpleNamespace(is_warming_up=False, between_steps=lambda: None, port=port)
        self.scheduler = SimpleNamespace(has_unfinished_requests=lambda: True)


def no_work(_self: Any, *_args: Any, **_kwargs: Any) -> int:
    """Do nothing."""
    return 1


OUTPUT = SimpleNamespace(kv_connector_metadata=None, kv_connector_output=None)


def pass_on(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function and do nothing: what any wrapper costs here."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    return wrapper


CASES: dict[str, tuple[Callable[[Any], Any], tuple[Any, ...]]] = {
    "a wrapper that only passes on": (pass_on, (None, 1)),
    "allocate_slots, per request": (
        engine_hooks.kv_cache_manager_allocate_slots,
        (SimpleNamespace(num_computed_tokens=1), 1),
    ),
    "get_num_skipped_tokens, per request": (engine_hooks.get_num_skipped_tokens, (1,)),
    "schedule, per step": (engine_hooks.scheduler_schedule, ()),
    "post_step, per step": (engine_hooks.engine_core_post_step, (True,)),
    "update_from_output, per step": (transfer_hooks.scheduler_update_from_output, (OUTPUT, OUTPUT)),
    "execute_model, per step": (worker_hooks.worker_execute_model, (OUTPUT,)),
}


def seconds(call: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Return the seconds of one call."""
    owner = Owner()
    start = CLOCK()
    for _ in range(NUM_CALLS):
        call(owner, *arguments)
    return (CLOCK() - start) / NUM_CALLS


def main() -> None:
    """Measure, print, write JSON."""
    arguments = command_line(__doc__)
    options = arguments.parse_args()
    added: dict[str, float] = {}
    rounds: dict[str, list[float]] = {}
    for label, (wrap, arguments) in CASES.items():
        wrapped = wrap(no_work)
        pairs = [
            seconds(wrapped, arguments) - seconds(no_work, arguments) for _ in range(NUM_PAIRS)
        ]
        rounds[label] = [pair * 1e6 for pair in pairs]
        added[label] = statistics.median(rounds[label])
        print(f"{label}: {added[label]:.2f} us more")
    results = {"machine": describe_machine(), "added_us_per_call": added, "rounds": rounds}
    write(options.json, results)


if __name__ == "__main__":
    main()
