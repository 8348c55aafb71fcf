"""Servers of the harness, forked from a parent that has imported their engine."""

from collections.abc import Mapping
from pathlib import Path

from helpers.nursery import WarmProcess, start_warm
from kvcached_demo.harness.plan import Plan


def launch_warm(
    plan: Plan, command: list[str], environ: Mapping[str, str], log: Path
) -> WarmProcess:
    """Start a server's first process; what a start costs beside imports is all that is left."""
    python, *words = command
    with log.open("wb") as file:
        output = file.fileno()
        return start_warm(
            plan.engine.name, words, environ, output=output, errors=output, python=python
        )
