"""Run as a script: an engine with a tier on disk answers, gives memory back, and reports.

Arguments: a model folder, and a JSON object: `copier` (see `Offloaded`), `root`, the folder of the
tier, `remove`, which is true where all files of the tier shall be removed under it, and `kill`,
where the engine's core shall be killed at the end. It is a process of its own, with vLLM's loop.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helpers.offline import VOCABULARY
from helpers.offloaded import IS_ELASTIC, Offloaded
from helpers.waiting import await_that

NUM_PROMPTS = 6
CHUNK_BYTES = 1 << 20
OPTIONS = {"max_model_len": 256}


def prompts() -> list[list[int]]:
    """Return prompts of three full chunks, which share nothing."""
    source = random.Random(5)
    return [
        [source.randrange(3, VOCABULARY) for _ in range(source.randrange(100, 128))]
        for _ in range(NUM_PROMPTS)
    ]


def num_files(root: str) -> int:
    """Return how many chunks are on disk."""
    return len(list(Path(root).rglob("*.bin")))


def row() -> Any:
    """Return what the ledger has of the engine."""
    from kvcached_core.config import read_config
    from kvcached_core.ledger.ledger import Ledger

    with Ledger(read_config().dir / "host.ledger") as ledger:
        (view,) = ledger.view().instances
    return view


def give_all() -> Any:
    """Have the engine give all that no request needs, through its bell; return its row then."""
    from kvcached_core.config import read_config
    from kvcached_core.control import trim

    trim([], directory=read_config().dir)
    view = row()
    return {name: getattr(view, name) for name in ("resident_bytes", "page_bytes")}


def remove_files(engine: Offloaded, root: str, asked: Sequence[list[int]]) -> dict[str, Any]:
    """Remove all files; ask what host memory still has, then the rest, then the first once more.

    It has room for four chunks, and so has those of the last prompt that was asked.
    """
    *others, last = asked
    of_others, of_all = (sum(map(engine.full_chunk_tokens, each)) // 32 for each in (others, asked))
    for path in Path(root).rglob("*.bin"):
        path.unlink()

    def ask(prompts: Sequence[list[int]]) -> tuple[list[list[int]], int]:
        give_all()
        assert engine.llm.reset_prefix_cache()
        before = engine.hits()
        tokens = [engine.generate([prompt])[0] for prompt in prompts]
        return tokens, engine.hits() - before

    _, host_hits = ask([last])
    tokens, later_hits = ask(others)
    await_that(lambda: num_files(root) >= of_others)
    num_first = num_files(root)
    again, _ = ask([last])
    await_that(lambda: num_files(root) >= of_all)
    return {
        "tokens": tokens + again,
        "host_hits": host_hits,
        "later_hits": later_hits,
        "num_files": [num_first, num_files(root)],
    }


def disk_counts() -> dict[str, Any]:
    """Return what the engine has told others of its tier on disk."""
    from kvcached_core.config import read_config
    from kvcached_core.weights.host_tier import DISK, read_tiers

    (view,) = read_tiers(read_config().copies_dir)
    return next((asdict(each) for each in view.counts if each.tier == DISK), {})


def kill_core(engine: Offloaded) -> str:
    """Kill the engine's core; return the file in which it had the host tier."""
    from kvcached_vllm.host_tier import region_of

    region = region_of(engine.llm.llm_engine.vllm_config)
    assert Path(region).exists()
    os.kill(row().pid, signal.SIGKILL)
    return region


def main() -> None:
    """Start, answer, give, report."""
    options = json.loads(sys.argv[2])
    engine = Offloaded(sys.argv[1], options.get("copier"), **OPTIONS)
    asked = prompts()
    report: dict[str, Any] = {"tokens": [engine.generate([prompt])[0] for prompt in asked]}
    if root := options.get("root"):
        num_chunks = sum(map(engine.full_chunk_tokens, asked)) // 32
        await_that(lambda: num_files(root) >= num_chunks)
        report["num_files"] = num_files(root)
        report["hits"] = engine.hits()
        report["copied"] = engine.copied()
        name = "loaded_bytes" if report["hits"] else "stored_bytes"  # it was all written before
        await_that(lambda: disk_counts().get(name, 0) >= num_chunks * CHUNK_BYTES)
        report["counted"] = disk_counts()
        if options.get("remove"):
            report["removed"] = remove_files(engine, root, asked)
    if IS_ELASTIC:
        report["given"] = give_all()
    if options.get("kill"):
        report["region"] = kill_core(engine)
    print("\n" + json.dumps(report), flush=True)


if __name__ == "__main__":
    assert os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "1"
    main()
