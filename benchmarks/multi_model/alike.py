"""Whether the modes in a folder, which several runs may have filled, can be compared at all."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from multi_model.client import Record
from multi_model.errors import ModeError
from multi_model.modes import ALONE, Site, describe


def settings_of(
    site: Site, drain_seconds: float, machine: Mapping[str, Any], shapes: Sequence[str]
) -> dict[str, Any]:
    """Return what all modes of a comparison have to have in common, as each replay keeps it.

    Args:
        site: Where it runs.
        drain_seconds: How long after the last request all may go on.
        machine: What it runs on, with its releases.
        shapes: Of the models.
    """
    return {
        "device": machine.get("gpu") or machine.get("processor"),
        "vLLM": machine.get("versions", {}).get("vllm"),
        "models": ", ".join(dict.fromkeys(shapes)),
        "shared": describe(site),
        "prefix caching": site.caching,
        "more options": " ".join(site.options),
        "seconds to drain": drain_seconds,
    }


def unlike(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return in words which settings differ between modes.

    Args:
        settings: Of each mode; earlier records have none.
    """
    said = []
    for name in dict.fromkeys(name for each in settings.values() for name in each):
        values = {mode: each[name] for mode, each in settings.items() if name in each}
        if len(set(values.values())) > 1:
            words = ", ".join(f"{mode} {value}" for mode, value in values.items())
            said.append(f"{name}: {words}")
    return said


def check_schedules(key: str, found: Mapping[str, Sequence[Record]]) -> None:
    """See that all modes were asked the same; `alone` may have had a part of it.

    Raises:
        ModeError: If two were not: a run with other words has filled a part of the folder.
    """
    asked = {
        mode: sorted((each.due_seconds, each.model, each.num_in, each.num_out) for each in records)
        for mode, records in found.items()
        if not mode.startswith(ALONE)
    }
    for (one, of_one), (other, of_other) in itertools.pairwise(asked.items()):
        if of_one != of_other:
            raise ModeError(
                f"{key}: {one} and {other} had different schedules, so they are not compared;"
                " run one of them again, or take it out of the folder"
            )
