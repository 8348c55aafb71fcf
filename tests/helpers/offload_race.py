"""Run as a script: requests come, end, are aborted and preempted while memory is asked for.

Arguments: a model folder, and a JSON object: `copier` (see `Offloaded`), `seed`, `num_requests`,
`prefix_tokens` (how long what prompts share may be), and `holds`, which is false where pages shall
be given under open copies.

The copier compares what it copied with what a step left, and debugging compares a step's blocks
with the pages that are mapped; a copy of an unmapped page ends the process.
"""

import json
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

from helpers.house import Neighbour
from helpers.offline import VOCABULARY
from helpers.offloaded import SAMPLING, Offloaded

OPTIONS = {"max_model_len": 512, "max_num_seqs": 6}
NUM_PREFIXES, PREFIX_TOKENS = 10, (100, 350)
MAX_TAKEN_PAGES = 10


def switch_holds_off() -> None:
    """Plant the defect that the race is for: no copy keeps a page."""
    from kvcached_core.engine.pages import Pages
    from kvcached_vllm.block_pool import ElasticBlockPool
    from kvcached_vllm.offloaded_pool import OffloadedBlockPool

    Pages.hold = lambda *_: None  # type: ignore[method-assign]
    OffloadedBlockPool.free_blocks = ElasticBlockPool.free_blocks  # type: ignore[method-assign]


class Race:
    """Draws what happens next, and does it."""

    def __init__(
        self, engine: Offloaded, seed: int, prefix_tokens: tuple[int, int] = PREFIX_TOKENS
    ) -> None:
        from kvcached_core.config import read_config

        self.engine, self.random = engine, random.Random(seed)
        self._llm_engine = engine.llm.llm_engine
        environ = {name: value for name, value in os.environ.items() if name.startswith("KVCACHED")}
        self._neighbour = Neighbour(read_config(environ | {"KVCACHED_NAME": "neighbour"}))
        source = random.Random(0)
        self._prefixes = [
            [source.randrange(3, VOCABULARY) for _ in range(source.randrange(*prefix_tokens))]
            for _ in range(NUM_PREFIXES)
        ]
        self._live: set[str] = set()
        self.counts = dict.fromkeys(
            ("answered", "aborted", "taken", "trims", "resets", "sleeps", "preemptions"), 0
        )

    def run(self, num_requests: int) -> None:
        """Have so many requests come, with all else in between, and end all that is left."""
        for number in range(num_requests):
            self._add(str(number))
            for _ in range(self.random.randrange(1, 5)):
                self._step()
                self._happen()
        self._neighbour.give_back()  # requests would wait for it for ever
        while self._live:
            self._step()
        self.engine.finish()
        self.counts["preemptions"] = self.engine.count("vllm:num_preemptions")

    def close(self) -> None:
        self._neighbour.close()

    def _add(self, request_id: str) -> None:
        from vllm import SamplingParams

        prefix = self.random.choice(self._prefixes)
        tail = [self.random.randrange(3, VOCABULARY) for _ in range(self.random.randrange(1, 60))]
        sampling = SamplingParams(max_tokens=self.random.randrange(1, 24), **SAMPLING)
        prompt: Any = {"prompt_token_ids": prefix + tail}
        self._llm_engine.add_request(request_id, prompt, sampling)
        self._live.add(request_id)

    def _step(self) -> None:
        for output in self._llm_engine.step():
            if output.finished:
                self._live.discard(output.request_id)
                self.counts["answered"] += 1

    def _happen(self) -> None:
        chance = self.random.random()
        for act, share in self._acts():
            if chance < share:
                act()
                return
            chance -= share

    def _acts(self) -> Iterator[tuple[Any, float]]:
        yield self._abort, 0.04
        yield self._take, 0.15
        yield lambda: self._neighbour.give_back(self.random.randrange(1, MAX_TAKEN_PAGES)), 0.15
        yield self._trim, 0.1
        yield self._reset, 0.02
        yield self._sleep, 0.005

    def _abort(self) -> None:
        if self._live:
            request_id = self.random.choice(sorted(self._live))
            self._llm_engine.abort_request([request_id])
            self._live.discard(request_id)
            self.counts["aborted"] += 1

    def _take(self) -> None:
        self._neighbour.take(self.random.randrange(1, MAX_TAKEN_PAGES))
        self.counts["taken"] += 1

    def _trim(self) -> None:
        self.engine.trim_known()
        self.counts["trims"] += 1

    def _reset(self) -> None:
        is_connector = self.random.random() < 0.5
        self.engine.core.reset_prefix_cache(
            reset_running_requests=is_connector and self._can_stop_requests(),
            reset_connector=is_connector,
        )
        self.counts["resets"] += 1

    def _can_stop_requests(self) -> bool:
        """Return whether vLLM bears a reset that stops requests, which are those that run.

        One that does not run may have blocks, and then vLLM raises: while it loads, when it has
        loaded and finds no room for the rest, and when it was aborted meanwhile. One that has
        finished may be stored still.
        """
        scheduler = self.engine.core.scheduler
        running = {one.request_id for one in scheduler.running}
        resting = (one for one in scheduler.requests.values() if one.request_id not in running)
        return not any(
            one.is_finished() or any(scheduler.kv_cache_manager.get_block_ids(one.request_id))
            for one in resting
        )

    def _sleep(self) -> None:
        if not self._live:
            self.engine.llm.sleep(level=1)
            self.engine.llm.wake_up()
            self.counts["sleeps"] += 1


def main() -> None:
    """Start, race, report."""
    options = json.loads(sys.argv[2])
    engine = Offloaded(sys.argv[1], options["copier"], **OPTIONS)
    if not options.get("holds", True):
        switch_holds_off()
    race = Race(engine, options["seed"], options.get("prefix_tokens", PREFIX_TOKENS))
    race.run(options["num_requests"])
    report: dict[str, Any] = {"counts": race.counts, "copied": engine.copied()}
    report["num_held"] = engine.core.kvcached.holds.num_holders
    report["hit_tokens"] = engine.hits()
    engine.core.reset_prefix_cache()
    engine.trim()
    report["pages"] = engine.resident_pages()
    race.close()
    print("\n" + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
