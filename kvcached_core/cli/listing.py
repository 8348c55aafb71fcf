"""What `kvcached list` says: a line for each instance, or everything as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvcached_core.cli.columns import weights_text
from kvcached_core.cli.images import disk_images
from kvcached_core.cli.tiers import tier_text
from kvcached_core.ledger.reach import pressure
from kvcached_core.ledger.survey import Survey
from kvcached_core.ledger.view import DeviceView, InstanceView
from kvcached_core.units import format_bytes
from kvcached_core.weights.host_tier import TierView


def line(view: DeviceView, instance: InstanceView, tiers: Sequence[TierView]) -> str:
    """Return the line of one instance, its parts behind tabs."""
    parts = [view.device, instance.name, instance.engine, f"pid {instance.pid}"]
    if instance.is_program:
        held, announced = map(format_bytes, (instance.resident_bytes, instance.static_bytes))
        return "\t".join([*parts, f"holds {held}, {announced} announced"])
    parts.append(f"weights {weights_text(instance)}")
    parts += [tier_text(tier) for tier in tiers if tier.instance == instance.name]
    return "\t".join(parts)


def to_json(found: Survey, tiers: Sequence[TierView]) -> str:
    """Return what was seen as JSON: sizes in bytes, pressure as a share of 1."""
    return json.dumps(
        {
            "devices": [
                {
                    **asdict(view),
                    "free_bytes": view.free_bytes,
                    "instances": [
                        {**asdict(row), "pressure": pressure(view, row)} for row in view.instances
                    ],
                }
                for view in found.devices
            ],
            "tiers": [asdict(tier) for tier in tiers],
            "weights_disk": _disk(),
            "problems": found.problems,
        },
        indent=2,
    )


def _disk() -> dict[str, Any] | None:
    found = disk_images()
    if found is None:
        return None
    names = ("name", "num_bytes", "is_used")
    images = [{name: getattr(held, name) for name in names} for held in found.holders]
    return {"images": images, "moves": asdict(found.moves)}
