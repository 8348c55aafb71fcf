"""ovg-project's kvcached beside ours: started in an environment that its user made.

Nothing of it is here. Its own README says to switch it on by two variables, to leave the engine's
share of the memory alone, and to name each server's segment where several run.
"""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multi_model.errors import ModeError

from kvcached_demo.harness.plan import Plan
from kvcached_demo.harness.server import start_cold

VERSION = "0.1.6"
# Asks an interpreter which releases it has of theirs, of ours and of the engine.
QUESTION = """
from importlib.metadata import PackageNotFoundError, version
for name in ("kvcached", "kvcached-elastic", "vllm"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "none")
"""


def check(python: str, vllm: str | None) -> dict[str, str]:
    """Return which releases an interpreter has.

    Args:
        python: The interpreter.
        vllm: The release of vLLM that the other modes run; None where they have none.

    Raises:
        ModeError: If it does not run, has another release of theirs than is compared, or ours too,
            or another vLLM than the other modes: what differs then could be vLLM's.
    """
    if not python:
        raise ModeError(
            "upstream needs --upstream-python: the interpreter of an environment with vLLM and"
            f" kvcached=={VERSION} (pip install kvcached=={VERSION} --no-build-isolation)"
        )
    try:
        said = subprocess.run(
            [python, "-c", QUESTION], capture_output=True, text=True, check=True, env={}
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ModeError(f"upstream: the interpreter {python!r} does not run: {error}") from None
    found = dict(line.split(" ", 1) for line in said.splitlines())
    if found.get("kvcached") != VERSION:
        raise ModeError(f"upstream: {python!r} has kvcached {found.get('kvcached')}, not {VERSION}")
    if found.get("kvcached-elastic") != "none":
        raise ModeError(
            f"upstream: {python!r} has kvcached-elastic too; the two exclude each other"
        )
    if found.get("vllm") == "none":
        raise ModeError(f"upstream: {python!r} has no vllm")
    if vllm is not None and found.get("vllm") != vllm:
        raise ModeError(
            f"upstream: {python!r} has vllm {found.get('vllm')}, other modes have {vllm}"
        )
    return found


def environ(name: str, cap_bytes: int, device_bytes: int) -> dict[str, str]:
    """Return the variables that switch it on for one server.

    Args:
        name: The server's name; each has a segment of its own, also beside another run's.
        cap_bytes: What all servers may use of the device.
        device_bytes: The device's memory.
    """
    found = {
        "ENABLE_KVCACHED": "true",
        "KVCACHED_AUTOPATCH": "1",
        "KVCACHED_IPC_NAME": f"multi-model-{os.getpid()}-{name}",
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the runner that it supports
        "PYTHONPATH": "",  # nothing of ours is in its processes
    }
    if cap_bytes < device_bytes:  # of the device, all that its servers may use together
        found["KVCACHED_GPU_UTILIZATION"] = f"{cap_bytes / device_bytes:.3f}"
    return found


def launch_with(python: str) -> Any:
    """Return what starts a server's process with another interpreter than ours."""

    def launch(
        plan: Plan, command: list[str], variables: Mapping[str, str], log: Path
    ) -> "subprocess.Popen[bytes]":
        return start_cold(plan, [python, *command[1:]], variables, log)

    return launch
