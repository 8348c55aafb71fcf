"""Modules of the tests that SGLang's processes find as plugins, beside ours."""

import os
from pathlib import Path


def add_plugin(folder: Path, module: str) -> dict[str, str]:
    """Return the variables with which processes call `register` of a module.

    Args:
        folder: Where the plugin's metadata goes.
        module: The module's name.
    """
    name = module.rpartition(".")[2]
    paths = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    metadata = folder / f"{name}-1.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        f"[sglang.srt.plugins]\n{name} = {module}:register\n"
    )
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
