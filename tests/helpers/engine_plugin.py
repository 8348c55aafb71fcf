"""Modules of the tests that processes of an engine find as plugins, beside ours."""

import os
from pathlib import Path

# Where each engine looks for plugins.
SGLANG = "sglang.srt.plugins"
VLLM = "vllm.general_plugins"


def add_plugin(folder: Path, module: str, group: str = SGLANG) -> dict[str, str]:
    """Return the variables with which processes call `register` of a module.

    Args:
        folder: Where the plugin's metadata goes.
        module: The module's name.
        group: What the engine calls its plugins.
    """
    name = module.rpartition(".")[2]
    paths = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    metadata = folder / f"{name}-1.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:register\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
