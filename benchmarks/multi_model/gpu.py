"""The GPU that the servers run on, as NVML sees it: memory in use, and energy."""

import contextlib
import os
from typing import Any


class Gpu:
    """The first GPU that this process may use; None of it needs a CUDA context."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml: Any = pynvml
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        self._handle = (
            pynvml.nvmlDeviceGetHandleByIndex(int(visible))
            if visible.isdecimal()
            else pynvml.nvmlDeviceGetHandleByUUID(visible)
        )

    @property
    def total_bytes(self) -> int:
        """Its memory."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).total)

    def used_bytes(self) -> int:
        """Return what is in use now, by anybody."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def joules(self) -> float | None:
        """Return the energy that it has used since its driver was loaded, if it counts."""
        with contextlib.suppress(self._nvml.NVMLError):
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        return None
