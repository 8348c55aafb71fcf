"""The cluster as one gateway shows itself: a row for each model and for each device."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvcached_gateway.admin.views import DeviceRow, ModelRow
from kvcached_gateway.settings.config import Settings
from kvcached_gateway.state import State
from kvcached_ray.ranking import RANKS
from kvcached_ray.report import Standing

__all__ = ["device_rows", "model_rows"]

LAST = len(RANKS)


def model_rows(settings: Settings, nodes: Sequence[Standing]) -> list[ModelRow]:
    """Return every model of the file, in its order: as it is where it is up, or the furthest."""
    return [_row(model.id, settings, nodes) for model in settings.models.values()]


def device_rows(nodes: Iterable[Standing]) -> list[DeviceRow]:
    """Return every device of every node."""
    return [
        replace(row, id=f"{node.place.name}/{row.id}") for node in nodes for row in node.devices
    ]


def _row(model_id: str, settings: Settings, nodes: Iterable[Standing]) -> ModelRow:
    model = settings.models[model_id]
    if model.adapter_of is not None:
        return ModelRow(model_id, "adapter", reason=f"of {model.adapter_of}")
    found = [(node, node.models[model_id]) for node in nodes if model_id in node.models]
    if not found:
        return ModelRow(
            model_id,
            State.COLD,
            model.instance_name,
            class_name=model.class_name,
            is_pinned=model.pin,
        )
    found.sort(key=lambda one: (RANKS.get(one[1].state, LAST), one[0].place.name))
    _, first = found[0]
    rows = [row for _, row in found]
    return replace(
        first,
        devices=tuple(f"{node.place.name}/{name}" for node, row in found for name in row.devices),
        num_leases=sum(row.num_leases for row in rows),
        num_waiting=sum(row.num_waiting for row in rows),
        oldest_wait_seconds=max(row.oldest_wait_seconds for row in rows),
        num_starts=sum(row.num_starts for row in rows),
        start_seconds=max(row.start_seconds for row in rows),
        is_pinned=any(row.is_pinned for row in rows),
        weighted_rate=sum(row.weighted_rate for row in rows),
        log="",  # it lies on the node
    )
