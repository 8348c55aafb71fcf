"""What `offload_rounds` does with an engine beside its two rounds of prompts."""

import random
import time
import traceback
from typing import Any

from helpers.offline import VOCABULARY, mixed_prompts
from helpers.offloaded import BLOCK_TOKENS, IS_ELASTIC, SAMPLING, Offloaded

NUM_PROMPTS = 18
MAX_STEPS = 20
CONTEXT_LIMIT = "80MiB"
NUM_CONTEXTS, NUM_ANSWER_TOKENS = 24, 64
NUM_RUNNING_PAGES = 3  # page 0, what one request needs, and a spare one


def lose_cache(engine: Offloaded, report: dict[str, Any]) -> None:
    """Leave nothing of the cache on the device."""
    engine.finish()
    if IS_ELASTIC:
        engine.trim()
        report.setdefault("after_trim", []).append(engine.resident_pages())
    assert engine.llm.reset_prefix_cache()  # page 0 never goes, nor what is cached there


def one_by_one(engine: Offloaded, report: dict[str, Any]) -> None:
    """Count what comes back of prompts that share nothing, each asked alone."""
    report["hits"] = []
    for prompt in mixed_prompts()[1:NUM_PROMPTS:3]:
        lose_cache(engine, report)
        before = engine.hits()
        engine.generate([prompt])
        report["hits"].append([engine.hits() - before, engine.full_chunk_tokens(prompt)])


def last_request(engine: Offloaded, report: dict[str, Any]) -> None:
    """Make no step behind the last request, as a caller of `generate` does, and look."""
    engine.generate([[seed, *prompt] for seed, prompt in enumerate(mixed_prompts()[1:9:3], 50)])
    report["open_after_last"] = len(engine.core.kvcached.port.copies.job_ids)
    report["held_after_last"] = bool(engine.core.kvcached.holds)
    assert engine.llm.reset_prefix_cache()  # what is cached may stay
    report["pages_after_last"] = engine.resident_pages()


def contexts_beyond_memory(engine: Offloaded, report: dict[str, Any]) -> None:
    """Hold conversations whose contexts are four times what the engine may hold; report answers.

    All ask at once, so most wait, and some are stopped while they are answered.
    """
    source = random.Random(3)
    contexts = [
        [source.randrange(3, VOCABULARY) for _ in range(source.randrange(416, 448))]
        for _ in range(NUM_CONTEXTS)
    ]
    if IS_ELASTIC:
        lose_cache(engine, {})
        engine.limit(CONTEXT_LIMIT)
        report["context_tokens"] = sum(map(len, contexts))
        report["limit_tokens"] = BLOCK_TOKENS * engine.num_blocks_within_limit()
        preempted = engine.count("vllm:num_preemptions")
    report["context_answers"], report["context_hits"] = [], []
    for _ in range(2):
        before = engine.hits() if IS_ELASTIC else 0
        answers = engine.generate(contexts, NUM_ANSWER_TOKENS)
        report["context_answers"].append(answers)
        report["context_hits"].append(engine.hits() - before if IS_ELASTIC else 0)
        contexts = [context + answer for context, answer in zip(contexts, answers, strict=True)]
    if IS_ELASTIC:
        report["context_preemptions"] = engine.count("vllm:num_preemptions") - preempted
        report["context_pages"] = len(engine.resident_pages()[0])
        engine.limit("none")


def give_with_open_jobs(engine: Offloaded, report: dict[str, Any]) -> None:
    """Ask for all that no request needs while one runs and copies are under way."""
    from vllm import SamplingParams

    from helpers.delayed_copies import copies_left_open

    prompts = [[seed, *prompt] for seed, prompt in enumerate(mixed_prompts()[1:18:3], 200)]
    expected = engine.generate(prompts)
    lose_cache(engine, report)
    prompts = [[seed, *prompt] for seed, prompt in enumerate(mixed_prompts()[1:48:3], 300)]
    step, copies = engine.llm.llm_engine.step, engine.core.kvcached.port.copies
    running: Any = {"prompt_token_ids": prompts[0][:100]}
    sampling = SamplingParams(max_tokens=200, **SAMPLING)
    with copies_left_open():
        engine.answer(prompts)
        before = engine.count("vllm:num_preemptions")
        engine.llm.llm_engine.add_request("running", running, sampling)
        step()
        report["open_at_give"] = len(copies.job_ids)
        started = time.perf_counter()
        engine.trim()
        step()
        engine.trim()
        report["num_kept_at_give"] = len(engine.resident_pages()[0])
    while copies.job_ids:
        step()
    report["copies_seconds"] = time.perf_counter() - started
    report["num_steps_after_copies"] = 0
    while len(engine.resident_pages()[0]) > NUM_RUNNING_PAGES:
        if report["num_steps_after_copies"] == MAX_STEPS:
            break
        step()
        report["num_steps_after_copies"] += 1
    report["give_seconds"] = time.perf_counter() - started
    report["num_given"] = report["num_kept_at_give"] - len(engine.resident_pages()[0])
    engine.finish()
    report["num_preempted"] = engine.count("vllm:num_preemptions") - before
    prompts = [[seed, *prompt] for seed, prompt in enumerate(mixed_prompts()[1:18:3], 200)]
    report["right_after_give"] = engine.generate(prompts) == expected


def give_beside_open_jobs(engine: Offloaded, report: dict[str, Any]) -> None:
    """Ask for all of it while copies are always open: what was copied goes, and the rest stays."""
    from vllm import SamplingParams

    from helpers.delayed_copies import copies_left_open

    lose_cache(engine, {})
    step, core = engine.llm.llm_engine.step, engine.core.kvcached
    copies, source = core.port.copies, random.Random(9)
    prompts = [[source.randrange(3, VOCABULARY) for _ in range(480)] for _ in range(10)]

    def pages_of(jobs: set[int]) -> set[int]:
        return set().union(*(core.holds._pages_of.get(job, ()) for job in jobs))

    def resident() -> set[int]:
        return set(engine.resident_pages()[0])

    with copies_left_open() as gate:
        engine.answer(prompts[:6])
        step()
        first = copies.job_ids
        engine.answer(prompts[6:])
        running: Any = {"prompt_token_ids": prompts[0][:100]}
        sampling = SamplingParams(max_tokens=200, **SAMPLING)
        engine.llm.llm_engine.add_request("beside", running, sampling)
        step()
        later = copies.job_ids - first
        of_later = pages_of(later)
        of_first = pages_of(first) - of_later - {0}
        engine.trim()
        step()
        report["num_of_first"] = len(of_first & resident())
        gate.open_to(max(first))
        while first & copies.job_ids:
            step()
        num_steps = 0
        while of_first & resident() and num_steps < MAX_STEPS:
            step()
            num_steps += 1
        report["num_steps_beside_copies"] = num_steps
        report["num_jobs_beside"] = len(later & copies.job_ids)
        report["later_is_kept"] = of_later <= resident()
    engine.finish()
    engine.trim()
    report["after_beside"] = engine.resident_pages()


def reset_with_open_jobs(engine: Offloaded, report: dict[str, Any]) -> None:
    """Reset the cache, and the connector, while copies are under way; then ask once more."""
    from helpers.delayed_copies import copies_left_open

    prompts = [[seed, *prompt] for seed, prompt in enumerate(mixed_prompts()[1:9:3], 7)]
    with copies_left_open():
        expected = engine.answer(prompts)
        engine.llm.llm_engine.step()
        report["open_at_reset"] = len(engine.core.kvcached.port.copies.job_ids)
        report["held_at_reset"] = bool(engine.core.kvcached.holds)
        report["reset"] = engine.core.reset_prefix_cache(reset_connector=True)
    report["after_reset"] = engine.resident_pages()
    before = engine.hits()
    with copies_left_open():
        report["right_after_reset"] = engine.answer(prompts) == expected
        report["hits_after_reset"] = engine.hits() - before
        engine.llm.llm_engine.step()
        # The cache alone: what is copied stays until it is, and goes then.
        report["open_at_cache_reset"] = len(engine.core.kvcached.port.copies.job_ids)
        engine.core.reset_prefix_cache()
        report["kept_by_copies"] = engine.resident_pages()
    engine.finish()
    report["after_copies"] = engine.resident_pages()
    report["right_after_cache_reset"] = engine.generate(prompts) == expected
    report["hits_after_cache_reset"] = engine.hits() - before


def sleep_with_open_jobs(engine: Offloaded, report: dict[str, Any]) -> None:
    """Let the engine sleep while copies are under way, and wake."""
    from helpers.delayed_copies import copies_left_open

    prompts = [[seed, *prompt] for seed, prompt in enumerate(mixed_prompts()[1:9:3], 70)]
    with copies_left_open():
        expected = engine.answer(prompts)
        engine.llm.llm_engine.step()
        report["open_at_sleep"] = len(engine.core.kvcached.port.copies.job_ids)
        engine.llm.sleep(level=1)
    report["asleep"] = engine.resident_pages()
    engine.llm.wake_up()
    report["right_after_sleep"] = engine.generate(prompts) == expected


def load_other_blocks(engine: Offloaded, report: dict[str, Any]) -> None:
    """Answer the prompts of the two rounds from what other layers hold; then forget all of it."""
    from helpers.delayed_copies import loads_spoiled

    prompts = mixed_prompts()[:NUM_PROMPTS]
    engine.generate(prompts)
    lose_cache(engine, {})
    before = engine.hits()
    with loads_spoiled():
        report["spoiled_tokens"] = engine.generate(prompts)
    report["spoiled_hits"] = engine.hits() - before
    assert engine.core.reset_prefix_cache(reset_connector=True)


def hold_for_both_ranks(engine: Offloaded, report: dict[str, Any]) -> None:
    """Ask for all of it while one rank has copied, and the other one not yet."""
    from vllm import SamplingParams

    lose_cache(engine, {})
    core, found = engine.core.kvcached, []
    copies, live = core.port.copies, set(map(str, range(6)))
    for name in live:
        asked: Any = {"prompt_token_ids": [400 + int(name), *mixed_prompts()[1 + 3 * int(name)]]}
        sampling = SamplingParams(max_tokens=1, **SAMPLING)
        engine.llm.llm_engine.add_request(name, asked, sampling)
    while live or copies.job_ids:
        live -= {one.request_id for one in engine.llm.llm_engine.step() if one.finished}
        engine.trim_known()
        half = [job for job, num_missing in copies._num_missing.items() if num_missing == 1]
        held = set().union(*(core.holds._pages_of.get(job, ()) for job in half)) - {0}
        if held:
            found.append(all(held <= set(pages) for pages in engine.resident_pages()))
    report["kept_by_one_rank"] = found
    engine.finish()
    engine.trim()
    report["after_both_ranks"] = engine.resident_pages()


def spoiled_sizes(engine: Offloaded, report: dict[str, Any]) -> None:
    """Write over what the host tier has, of one size of chunks after the other, and ask again."""
    from helpers.delayed_copier import made

    (copier,) = made
    report["spoiled"] = []
    for seed, size in enumerate(copier.sizes(), 400):
        prompt = [seed, *mixed_prompts()[1]]
        answers = []
        for is_spoiled in (False, False, True):
            lose_cache(engine, {})
            if is_spoiled:
                copier.spoil(size)
            answers.append(engine.generate([prompt]))
        report["spoiled"].append([answers[1] == answers[0], answers[2] != answers[0]])


def stop_and_keep_tier(engine: Offloaded, report: dict[str, Any]) -> None:
    """Stop a running request by a reset that keeps what the tier has of it; nothing comes after."""
    from vllm import SamplingParams

    asked: Any = {"prompt_token_ids": mixed_prompts()[1][:200]}
    sampling = SamplingParams(max_tokens=100, **SAMPLING)
    engine.llm.llm_engine.add_request("stopped", asked, sampling)
    while not engine.core.scheduler.running:
        engine.llm.llm_engine.step()
    assert engine.core.reset_prefix_cache(reset_running_requests=True)
    try:
        engine.finish()
    except AssertionError as error:
        report["ended_by"] = traceback.extract_tb(error.__traceback__)[-1].line
    else:
        report["ended_by"] = ""


ACTS = {
    act.__name__: act
    for act in (
        one_by_one,
        last_request,
        contexts_beyond_memory,
        give_with_open_jobs,
        give_beside_open_jobs,
        reset_with_open_jobs,
        sleep_with_open_jobs,
        load_other_blocks,
        hold_for_both_ranks,
        spoiled_sizes,
        stop_and_keep_tier,
    )
}
