"""Requests that wait for memory: seen in SGLang's gauges, and taken back in the ledger."""

import time
from typing import Any

from kvcached_core.engine.ranks import Ranks

GAUGE_SECONDS = 1.0


class Waiting:
    """Whether a scheduler's requests wait for memory.

    Args:
        ranks: The ledgers as the ranks see them; what is said in the log, is said there.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._published_at = 0.0

    def end_schedule(self, scheduler: Any, *, has_batch: bool) -> None:
        """Say who waits; take it back where nobody does any more."""
        if not self._ranks.end_schedule(is_busy=bool(scheduler.waiting_queue)) or has_batch:
            return
        now = time.monotonic()
        if now >= self._published_at + GAUGE_SECONDS:
            self._published_at = now
            publish_gauges(scheduler)


def publish_gauges(scheduler: Any) -> None:
    """Let SGLang's gauges say what waits. It sets them with a batch, and when it is idle."""
    reporter = getattr(scheduler, "metrics_reporter", scheduler)  # its own up to 0.5.12
    collector = getattr(reporter, "metrics_collector", None)
    publish = getattr(reporter, "_maybe_log_idle_metrics", None)
    if collector is not None and publish is not None:
        collector.last_log_time = 0.0  # it would wait for half a minute
        publish()
