"""What a run is made of: its profile's sizes, its workloads by name, its folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multi_model import workloads as schedules
from multi_model.modes import ModeError
from multi_model.traces import read_arena, read_azure
from multi_model.workloads import Workload

from kvcached_core.units import MIB

HOST, GPU = "host", "gpu"
# Of the host's profile: tiny models, few and short requests.
HOST_POOL_BYTES = 256 * MIB
HOST_WORKLOADS = ("ramp:2", "constant:1")
GPU_WORKLOADS = ("constant:4", "constant:8", "ramp:16", "ramp:24", "ramp:32", "ramp-together:6")
# The models of the GPU's profile.
SHAPES = ("llama-8b", "llama-1b")


@dataclass(frozen=True)
class Lengths:
    """What a profile's requests look like, and how long steady loads last."""

    num_in: int
    num_out: int
    num_out_together: int
    constant_seconds: float
    cross_check_seconds: float


LENGTHS = {HOST: Lengths(128, 32, 64, 4.0, 4.0), GPU: Lengths(256, 256, 2048, 30.0, 15.0)}


class Folder:
    """A run's folder: who put what where.

    Args:
        path: The folder; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, **facts: Any) -> None:
        """Add to the facts of the run."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "run.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | facts, indent=2) + "\n")

    def of(self, mode: str, workload: Workload) -> Path:
        """Return where a replay's files go, without their endings."""
        (self.path / mode).mkdir(parents=True, exist_ok=True)
        return self.path / mode / slug(workload)


def slug(workload: Workload) -> str:
    """Return a file's name for a workload."""
    words = f"{workload.name} {workload.num_models} models"
    return "".join(sign if sign.isalnum() or sign in ".=" else "-" for sign in words)


def make_workload(words: str, num_models: int, lengths: Lengths, seconds: float | None) -> Workload:
    """Return the workload that `NAME:NUMBER` names.

    Raises:
        ModeError: If there is none of that name, or the number is none.
    """
    name, _, number = words.partition(":")
    try:
        value = float(number or 1)
    except ValueError:
        raise ModeError(f"workload {words!r}: {number!r} is not a number") from None
    sizes = {"num_in": lengths.num_in, "num_out": lengths.num_out}
    match name:
        case "ramp":
            return schedules.ramp(int(value), num_models=num_models, **sizes)
        case "ramp-together":
            sizes["num_out"] = lengths.num_out_together
            return schedules.ramp_together(int(value), num_models=num_models, **sizes)
        case "constant":
            duration = seconds or lengths.constant_seconds
            return schedules.constant(value, duration, num_models=num_models, **sizes)
        case "arena":
            return schedules.arena(
                read_arena(), num_models=num_models, speed=value, seconds=seconds
            )
        case "azure":
            duration = seconds or 60.0
            return schedules.azure(
                read_azure(), seconds=duration, beside_rate=value, num_models=num_models
            )
    known = "ramp, ramp-together, constant, arena, azure"
    raise ModeError(f"workload {words!r} is not one of {known}, each with :NUMBER")
