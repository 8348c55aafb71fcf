"""Stand-ins for a `VllmConfig` that we serve, as far as we read it."""

from types import SimpleNamespace
from typing import Any


def parallel(**changes: Any) -> Any:
    values = {
        "data_parallel_size": 1,
        "data_parallel_index": 0,
        "enable_eplb": False,
        "world_size": 1,
        "distributed_executor_backend": None,
    }
    return SimpleNamespace(**(values | changes))


def configuration(**changes: Any) -> Any:
    values = {
        "device_config": SimpleNamespace(device_type="cpu"),
        "parallel_config": parallel(),
        "kv_transfer_config": None,
        "speculative_config": None,
        "attention_config": SimpleNamespace(hisparse_config=None),
        **changes,
    }
    return SimpleNamespace(**values)
