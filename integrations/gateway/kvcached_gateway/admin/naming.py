"""What the core's command line shows of a gateway's models: their names, and columns of `top`."""

from pathlib import Path

from kvcached_core.cli.added import Added
from kvcached_gateway.admin.client import Client, GatewayError
from kvcached_gateway.settings.durations import duration

PATIENCE_SECONDS = 0.5  # a picture waits for it


def instances(directory: Path) -> list[Added]:
    """Return the models of the gateway that serves from a folder; none where none does."""
    try:
        rows = Client(directory, PATIENCE_SECONDS).models()
    except GatewayError:
        return []
    return [
        Added(
            row.id,
            row.instance,
            {
                "state": row.state,
                "queue": str(row.num_waiting or ""),
                "wait": duration(row.oldest_wait_seconds) if row.num_waiting else "",
            },
            row.state,
        )
        for row in rows
        if row.instance
    ]
