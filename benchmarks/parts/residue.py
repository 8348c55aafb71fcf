"""What a server that has yielded its weights still holds of its device, and what each part is."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from parts.yielding import Run

from kvcached_demo.harness.engines import VLLM

# From the call to the report: the weights are gone by then.
REPORT_SECONDS = 3.0
WAIT_SECONDS = 20.0
CONTEXT = "import torch; torch.zeros(1, device='cuda'); print('there', flush=True); input()"


def used_bytes(run: Run) -> int:
    """Return what is in use of the device, by whomever; in a rehearsal what the servers count."""
    if run.tiny:
        names = run.servers.by_name
        return sum(run.view(name).resident_bytes for name in names)
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


def context_bytes(run: Run) -> int:
    """Return what a process takes that has a context on the device and one small tensor."""
    if run.tiny:
        return 0
    before = used_bytes(run)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", CONTEXT], stdin=pipe, stdout=pipe) as child:
        assert child.stdout is not None  # noqa: S101  mypy: it is a pipe
        child.stdout.readline()
        taken = used_bytes(run) - before
        child.communicate(b"\n")
    return taken


def yielded(run: Run, *names: str) -> dict[str, dict[str, Any]]:
    """Let servers yield; return what torch in each of their workers holds then, by their names."""
    asked = list[str]()
    for name in names:
        path = run.memory_path(name)
        path.unlink(missing_ok=True)
        if run.engine is VLLM:
            run.call(name, "write_memory", path, REPORT_SECONDS)
            asked.append(name)
        run.sleep(name)
        if run.engine is not VLLM and handles_signal(pid := run.view(name).pid):
            os.kill(pid, signal.SIGUSR2)
            asked.append(name)
    deadline = time.monotonic() + WAIT_SECONDS
    return {name: _read(run.memory_path(name), deadline) for name in asked}


def handles_signal(pid: int) -> bool:
    """Return whether a process has a handler for SIGUSR2; it would end one that has none."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = (line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGUSR2 - 1) & 1)


def _read(path: Path, deadline: float) -> dict[str, Any]:
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{path.name} is not there: the worker wrote no report")
        time.sleep(0.05)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def parts(
    held_bytes: int, of_context_bytes: int, of_pages_bytes: int, torchs: dict[str, Any]
) -> dict[str, int]:
    """Return what a server holds by what it is for, in bytes; the sum is `held_bytes`.

    Args:
        held_bytes: All that it holds.
        of_context_bytes: What a process takes that has nothing but a context.
        of_pages_bytes: Its resident pages.
        torchs: What torch in its worker says, see `helpers.residue`; nothing if it was not asked.
    """
    found = {"pages": of_pages_bytes, "context": of_context_bytes}
    for name in ("in_use", "graphs", "cached", "annex_resident"):
        found[name] = torchs.get(f"{name}_bytes", 0)
    return found | {"rest": held_bytes - sum(found.values())}
