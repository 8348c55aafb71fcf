"""What a run is made of: its profile's sizes, its workloads by name, its folder."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multi_model import conversations, many_models
from multi_model import workloads as schedules
from multi_model.errors import ModeError
from multi_model.modes import GPU_TOKENS
from multi_model.traces import read_arena, read_azure
from multi_model.workloads import Workload
from parts.record import write

from kvcached_core.units import MIB

HOST, GPU = "host", "gpu"
# Of the host's profile: tiny models, few and short requests.
HOST_POOL_BYTES = 256 * MIB
HOST_WORKLOADS = ("ramp:2", "constant:1")
GPU_WORKLOADS = ("constant:4", "constant:8", "ramp:16", "ramp:24", "ramp:32", "ramp-together:6")
# The models of the GPU's profile.
SHAPES = ("llama-8b", "llama-3b", "llama-1b")


@dataclass(frozen=True)
class Lengths:
    """What a profile's requests look like, and how long steady loads last.

    Attributes:
        num_in: Tokens of a prompt, where no log says it.
        num_out: Tokens of an answer.
        num_out_together: The same where all models are busy at once.
        constant_seconds: How long a steady load lasts.
        cross_check_seconds: The same of the comparison of clients.
        token_scale: What prompts of conversations and agents are multiplied by.
        max_tokens: The longest request, with its answer; longer prompts of a log are cut.
    """

    num_in: int
    num_out: int
    num_out_together: int
    constant_seconds: float
    cross_check_seconds: float
    token_scale: float
    max_tokens: int


LENGTHS = {
    HOST: Lengths(128, 32, 64, 4.0, 4.0, 0.125, 2048),
    GPU: Lengths(256, 256, 2048, 30.0, 15.0, 1.0, GPU_TOKENS),
}
# How long workloads last that may be of any length.
MINUTE, LONG_SECONDS = 60.0, 300.0


class Folder:
    """A run's folder: who put what where.

    Args:
        path: The folder; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, **facts: Any) -> None:
        """Add to the facts of the run."""
        write(self.path / "run.json", self.facts() | facts)

    def facts(self) -> dict[str, Any]:
        """Return what was added so far, by this run and those before it."""
        file = self.path / "run.json"
        return json.loads(file.read_text()) if file.exists() else {}

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

    Args:
        words: The name, and its number: a peak, a rate, a speed, or how many there are.
        num_models: How many models there are.
        lengths: How long requests are where no log says it.
        seconds: How long it lasts, where that is free; None takes its own default.

    Raises:
        ModeError: If there is none of that name, the number is none, or nothing is asked.
    """
    name, _, number = words.partition(":")
    if name not in WORKLOADS:
        known = ", ".join(WORKLOADS)
        raise ModeError(f"workload {words!r} is not one of {known}, each with :NUMBER")
    try:
        value = float(number or 1)
    except ValueError:
        raise ModeError(f"workload {words!r}: {number!r} is not a number") from None
    if not value > 0:
        raise ModeError(f"workload {words!r}: {number!r} is not above 0")
    made = WORKLOADS[name](value, num_models, lengths, seconds)
    if not made.requests:
        raise ModeError(f"workload {words!r} has no request in {seconds} s; ask for more seconds")
    return made.fitting(lengths.max_tokens)


def _ramp(value: float, num_models: int, lengths: Lengths, _seconds: float | None) -> Workload:
    sizes = {"num_in": lengths.num_in, "num_out": lengths.num_out}
    return schedules.ramp(int(value), num_models=num_models, **sizes)


def _ramp_together(
    value: float, num_models: int, lengths: Lengths, _seconds: float | None
) -> Workload:
    sizes = {"num_in": lengths.num_in, "num_out": lengths.num_out_together}
    return schedules.ramp_together(int(value), num_models=num_models, **sizes)


def _constant(value: float, num_models: int, lengths: Lengths, seconds: float | None) -> Workload:
    sizes = {"num_in": lengths.num_in, "num_out": lengths.num_out}
    duration = seconds or lengths.constant_seconds
    return schedules.constant(value, duration, num_models=num_models, **sizes)


def _arena(value: float, num_models: int, _lengths: Lengths, seconds: float | None) -> Workload:
    return schedules.arena(read_arena(), num_models=num_models, speed=value, seconds=seconds)


def _azure(value: float, num_models: int, _lengths: Lengths, seconds: float | None) -> Workload:
    return schedules.azure(
        read_azure(), seconds=seconds or MINUTE, beside_rate=value, num_models=num_models
    )


def _azure_dealt(
    value: float, num_models: int, _lengths: Lengths, seconds: float | None
) -> Workload:
    logs = (read_azure(), read_arena())
    return many_models.dealt(
        *logs, num_models=num_models, speed=value, seconds=seconds or LONG_SECONDS
    )


def _many(value: float, num_models: int, _lengths: Lengths, seconds: float | None) -> Workload:
    return many_models.many(
        read_arena(), num_models=num_models, rate=value, seconds=seconds or LONG_SECONDS
    )


def _serverless(
    value: float, num_models: int, _lengths: Lengths, seconds: float | None
) -> Workload:
    return many_models.serverless(
        read_arena(), num_models=num_models, speed=value, seconds=seconds or LONG_SECONDS
    )


def _returning(value: float, num_models: int, lengths: Lengths, seconds: float | None) -> Workload:
    return conversations.returning(
        int(value),
        num_models=num_models,
        seconds=seconds or LONG_SECONDS,
        scale=lengths.token_scale,
    )


def _agents(value: float, num_models: int, lengths: Lengths, seconds: float | None) -> Workload:
    return conversations.agents(
        int(value),
        num_models=num_models,
        seconds=seconds or LONG_SECONDS,
        scale=lengths.token_scale,
    )


WORKLOADS: dict[str, Callable[[float, int, Lengths, float | None], Workload]] = {
    "ramp": _ramp,
    "ramp-together": _ramp_together,
    "constant": _constant,
    "arena": _arena,
    "azure": _azure,
    "azure-dealt": _azure_dealt,
    "many": _many,
    "serverless": _serverless,
    "returning": _returning,
    "agents": _agents,
}
