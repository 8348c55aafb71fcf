"""Lets vLLM's processes serve the delayed copier, as a plugin that they find beside ours.

Nothing of vLLM is imported here.
"""

import os
from pathlib import Path
from typing import Any

COPIER = "helpers.delayed_copier"
CPU_SPEC, TIERS_SPEC = "DelayedSpec", "DelayedTiersSpec"


def register() -> None:
    """Have its specs served in this process; vLLM calls it in each of its own."""
    from kvcached_vllm.connectors import SERVED_SPECS

    SERVED_SPECS.update((CPU_SPEC, TIERS_SPEC))


def add_plugin(folder: Path) -> dict[str, str]:
    """Return the variables with which processes find it; its metadata goes to a folder."""
    paths = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    metadata = folder / "offload_plugin-1.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: offload-plugin\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\noffload_plugin = {__name__}:register\n"
    )
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


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
