"""Run as a script: an engine answers prompts, loses its cache, and answers them again; it reports.

Arguments: a model folder, and a JSON object: `copier` (see `Offloaded`), `options` of the engine,
`acts` beside the two rounds, and `layout` (see `offline_ends`).
"""

import json
import sys
from typing import Any

from helpers.offline import mixed_prompts
from helpers.offline_ends import offer
from helpers.offload_acts import ACTS, NUM_PROMPTS, lose_cache
from helpers.offloaded import IS_ELASTIC, Offloaded


def two_rounds(engine: Offloaded, report: dict[str, Any]) -> None:
    """Answer all prompts at once, twice."""
    prompts = mixed_prompts()[:NUM_PROMPTS]
    report["tokens"] = [engine.generate(prompts)]
    lose_cache(engine, report)
    report["tokens"].append(engine.generate(prompts))


def count(engine: Offloaded, options: dict[str, Any], report: dict[str, Any]) -> None:
    """Report what was copied and found so far."""
    if of_copier := options.get("copier"):
        engine.finish()
        report["copied"] = engine.copied() if of_copier.get("copier_report") else None
        report["num_hit_tokens"] = engine.hits()
        if IS_ELASTIC and engine.core is not None:
            report["num_told_tokens"] = engine.core.kvcached.tier.counts.hit_tokens


def main() -> None:
    """Start, run the acts, report."""
    options = json.loads(sys.argv[2])
    if "layout" in options:
        offer(options["layout"])
    engine = Offloaded(sys.argv[1], options.get("copier"), **options.get("options", {}))
    report: dict[str, Any] = {}
    two_rounds(engine, report)
    count(engine, options, report)
    for name in options.get("acts", ()):
        ACTS[name](engine, report)
    if "ended_by" not in report:
        count(engine, options, report)
    print("\n" + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
