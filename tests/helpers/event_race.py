"""Run as a script: whatever becomes of an engine's cache, a mirror made of its events equals it.

Arguments: a model folder, and a JSON object: `seed`, `num_operations` and `loses`, the name of an
event that is lost on its way if it shall be.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from helpers.event_mirror import EventMirror, cached_blocks, endpoint_in
from helpers.offload_race import Race
from helpers.offloaded import Offloaded

OPTIONS = {"max_model_len": 512, "max_num_seqs": 6}


class EventRace(Race):
    """Draws what happens next, does it, and compares."""

    def __init__(self, engine: Offloaded, mirror: EventMirror, seed: int, loses: str) -> None:
        super().__init__(engine, seed)
        self._mirror, self._loses = mirror, loses
        self._publisher = engine.core.scheduler.kv_event_publisher
        self._num_published = 0
        publish = self._publisher.publish

        def counted(batch: Any) -> None:
            batch.events = [one for one in batch.events if type(one).__name__ != loses]
            self._num_published += 1
            publish(batch)

        self._publisher.publish = counted
        mirror.join(self._publish_nothing)
        self.done: Counter[str] = Counter()
        self.num_compared = 0
        self.most_blocks = 0
        self.num_requests = 0

    def _publish_nothing(self) -> None:
        from vllm.distributed.kv_events import KVEventBatch

        self._publisher.publish(KVEventBatch(ts=time.time(), events=[]))

    def compare(self) -> bool:
        """Return whether the mirror is what the pool is."""
        self._mirror.follow(self._num_published)
        pool = cached_blocks(self.engine.core.scheduler.kv_cache_manager.block_pool)
        self.num_compared += 1
        self.most_blocks = max(self.most_blocks, sum(pool.values()))
        return self._mirror.blocks == pool

    def operate(self, num_operations: int) -> str:
        """Do so much, and compare behind each; return after what it differed, or nothing."""
        for _ in range(num_operations):
            name, act = self._draw()
            act()
            self.done[name] += 1
            if not self.compare():
                return name
        self._quiet()
        return "" if self.compare() else "the end"

    def _draw(self) -> tuple[str, Any]:
        acts = {
            "request": (self._add_one, 25),
            "step": (self._step, 45),
            "abort": (self._abort, 4),
            "take": (self._take, 8),
            "give back": (lambda: self._neighbour.give_back(self.random.randrange(1, 10)), 8),
            "trim": (self._trim, 5),
            "reset": (self._reset, 2),
            "reset that preempts": (self._reset_running, 2),
            "sleep": (self._sleep_when_quiet, 1),
            "limit": (self._limit, 2),
            "quiet": (self._quiet, 3),
        }
        weights = [weight for _, weight in acts.values()]
        (name,) = self.random.choices(list(acts), weights)
        return name, acts[name][0]

    def _add_one(self) -> None:
        self._add(str(self.num_requests))
        self.num_requests += 1

    def _sleep_when_quiet(self) -> None:
        self._quiet()
        self._sleep()

    def _reset(self) -> None:
        self.engine.core.reset_prefix_cache()

    def _reset_running(self) -> None:
        self.engine.core.reset_prefix_cache(reset_running_requests=True)

    def _quiet(self) -> None:
        """Answer all requests; what comes next meets an idle engine.

        They would wait for ever for what the neighbour has.
        """
        self._neighbour.give_back()
        while self._live:
            self._step()

    def _limit(self) -> None:
        self.engine.limit(self.random.choice(["24MiB", "32MiB", "none"]))


def main() -> None:
    """Start, operate, report."""
    options = json.loads(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        endpoint = endpoint_in(Path(folder))
        mirror = EventMirror(endpoint)
        events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
        engine = Offloaded(sys.argv[1], None, kv_events_config=events, **OPTIONS)
        race = EventRace(engine, mirror, options["seed"], options.get("loses", ""))
        report: dict[str, Any] = {"differs_after": race.operate(options["num_operations"])}
        report |= {
            "done": race.done,
            "num_sleeps": race.counts["sleeps"],
            "events": mirror.num_events,
            "num_compared": race.num_compared,
            "most_blocks": race.most_blocks,
            "preemptions": engine.count("vllm:num_preemptions"),
        }
        race.close()
        mirror.close()
        print("\n" + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
