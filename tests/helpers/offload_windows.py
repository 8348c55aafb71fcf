"""Run as a script: the tier of an engine has no room until a window has left blocks behind.

Arguments: the folder of a model with windows, and a JSON object: `copier` (see `Offloaded`), and
`forgets`, which is false where vLLM shall go on to name blocks whose pages went.
"""

import json
import random
import sys
from typing import Any

from helpers.delayed_copies import copies_left_open
from helpers.offline import VOCABULARY
from helpers.offload_acts import lose_cache
from helpers.offloaded import SAMPLING, Offloaded

NUM_PROMPT_TOKENS, NUM_TOKENS = 600, 48
NUM_STEPS_WITHOUT_ROOM = 4
RETENTION = "prefix_cache_retention_interval"


def named_blocks(engine: Offloaded, request_id: str) -> list[set[int]]:
    """Return the blocks that vLLM's connector would store of a request, by group."""
    status = engine.core.scheduler.connector.connector_scheduler._req_status
    (request,) = (one for name, one in status.items() if name.startswith(request_id))
    return [set(group.block_ids) - {0} for group in request.group_states]


def storing_all() -> dict[str, Any]:
    """Return with what option all blocks of a window are stored, not those of a prompt's end alone.

    0.28 knows nothing else.
    """
    from vllm.engine.arg_utils import EngineArgs

    return {RETENTION: None} if RETENTION in EngineArgs.__dataclass_fields__ else {}


def main() -> None:
    """Fill the tier, free blocks, give their pages, make room there; report what is stored."""
    from vllm import SamplingParams

    options = json.loads(sys.argv[2])
    engine = Offloaded(sys.argv[1], options["copier"], **storing_all())
    core = engine.core.kvcached
    if not options.get("forgets", True):
        core.port.pool.pages.on_close = lambda _pages: None
    source = random.Random(11)
    first, later = (
        [source.randrange(3, VOCABULARY) for _ in range(NUM_PROMPT_TOKENS)] for _ in range(2)
    )
    expected = engine.generate([later], NUM_TOKENS)
    lose_cache(engine, {})
    assert engine.core.reset_prefix_cache(reset_connector=True)
    step, tokens = engine.llm.llm_engine.step, list[int]()
    report: dict[str, Any] = {}
    with copies_left_open():
        engine.answer([first], 1)
        num_jobs = len(core.port.copies.job_ids)
        sampling = SamplingParams(max_tokens=NUM_TOKENS, **SAMPLING)
        engine.llm.llm_engine.add_request("later", {"prompt_token_ids": later}, sampling)
        for _ in range(NUM_STEPS_WITHOUT_ROOM):
            step()
        report["num_jobs_without_room"] = len(core.port.copies.job_ids) - num_jobs
        engine.trim()
        full, window = named_blocks(engine, "later")
        ids_per_page, pages = core.geometry.ids_per_page, core.port.pool.pages
        of_pages = {each // ids_per_page for each in full | window}
        report["num_named"] = [len(full), len(window)]
        report["num_pages_gone"] = len(of_pages.difference(pages.open_pages))
    while not tokens:
        for output in step():
            if output.finished:
                tokens = list(output.outputs[0].token_ids)
    report["is_right"] = [tokens] == expected
    lose_cache(engine, report)
    report["is_right_again"] = engine.generate([later], NUM_TOKENS) == expected
    print("\n" + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
