"""Lets vLLM's processes serve the delayed copier, as a plugin that they find beside ours.

Nothing of vLLM is imported here.
"""

from pathlib import Path
from typing import Any

from helpers import engine_plugin

COPIER = "helpers.delayed_copier"
CPU_SPEC, TIERS_SPEC = "DelayedSpec", "DelayedTiersSpec"


def register() -> None:
    """Have its specs served in this process; vLLM calls it in each of its own."""
    from kvcached_vllm.connectors import SERVED_SPECS

    SERVED_SPECS.update((CPU_SPEC, TIERS_SPEC))


def add_plugin(folder: Path) -> dict[str, str]:
    """Return the variables with which processes find it; its metadata goes to a folder."""
    return engine_plugin.add_plugin(folder, __name__, engine_plugin.VLLM)


def transfer(spec: str = CPU_SPEC, *, num_bytes: int, **extra: Any) -> dict[str, Any]:
    """Return the `kv_transfer_config` of an engine with the delayed copier."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": spec,
            "spec_module_path": COPIER,
            "cpu_bytes_to_use": num_bytes,
            **extra,
        },
    }
