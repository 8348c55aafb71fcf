"""Lets the copies of weights of SGLang's processes be lazy ones, as a plugin that they find.

Nothing of SGLang is imported here.
"""

import json
import os
from pathlib import Path

from helpers import engine_plugin

REPORT, DEFECT = "LAZY_REPORT", "LAZY_DEFECT"  # files: what is written to, and what is looked for


def register() -> None:
    """Have copies of this process done when somebody waits; SGLang calls it in each of its own."""
    from helpers.lazy_copies import LazyHostBackend
    from kvcached_core.memory import torch_device
    from kvcached_core.weights.arriving import Arriving
    from kvcached_core.weights.walks import Walk

    report, defect = Path(os.environ[REPORT]), Path(os.environ[DEFECT])
    pass_point, wait = Walk.pass_point, Arriving.wait

    def pass_and_tell(self: Walk, number: int) -> None:
        pass_point(self, number)
        backend = self._arriving._backend
        assert isinstance(backend, LazyHostBackend)
        with report.open("a") as file:
            file.write(json.dumps([number, backend.num_open]) + "\n")

    def wait_unless_defect(self: Arriving, num_pages: int) -> None:
        if not defect.exists():
            wait(self, num_pages)

    torch_device.HostBackend = LazyHostBackend  # type: ignore[misc]  the engine makes its own
    Walk.pass_point = pass_and_tell  # type: ignore[method-assign]
    Arriving.wait = wait_unless_defect  # type: ignore[method-assign]


def add_plugin(folder: Path) -> dict[str, str]:
    """Return the variables with which processes find it; its metadata goes to a folder."""
    files = {REPORT: str(folder / "report"), DEFECT: str(folder / "defect")}
    return engine_plugin.add_plugin(folder, __name__) | files
