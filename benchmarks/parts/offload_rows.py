"""The rows of `offload.py`: what is asked of servers with a host tier, and how it is judged."""

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from parts.offload_disk import disk
from parts.offload_servers import DISK, PLAIN, Bench, give_back, lose_cache
from parts.vllm_servers import QUIET_SECONDS
from vllm_overhead import CONTROL, ELASTIC, VANILLA, print_summary, summary

from kvcached_core.units import GIB, MIB
from kvcached_demo.harness.server import EngineServer

NUM_TOKENS = 16
NUM_LOAD = 8  # prompts beside a give: more than there is time for


def tokens(bench: Bench) -> dict[str, Any]:
    """Ask the same prompts of both servers with a tier, before and after the cache is lost."""
    prompts = [bench.prompt(bench.sizes.short_tokens + number) for number in range(8)]
    found: dict[str, Any] = {}
    for name in (VANILLA, ELASTIC):
        server = bench[name]
        first = [bench.answer(server, prompt, NUM_TOKENS) for prompt in prompts]
        bench.settle(server)
        loaded = bench.copied(server, "load")[0]
        left_bytes = lose_cache(bench, name) if name == ELASTIC else []
        again = [bench.answer(server, prompt, NUM_TOKENS) for prompt in prompts]
        bench.settle(server)
        loaded = bench.copied(server, "load")[0] - loaded
        found[name] = {"first": first, "again": again, "loaded_bytes": loaded}
        found[name] |= {"left_bytes": left_bytes}
    vanilla, elastic = found[VANILLA], found[ELASTIC]
    results = {
        "num_answers": len(prompts),
        "num_kinds": len({tuple(one) for one in vanilla["first"]}),
        "num_equal": sum(a == b for a, b in zip(vanilla["first"], elastic["first"], strict=True)),
        "num_equal_again": sum(
            a == b for a, b in zip(vanilla["first"], elastic["again"], strict=True)
        ),
        # A cache that was found is computed on in other pieces than a prompt that is new.
        "num_equal_both_again": sum(
            a == b for a, b in zip(vanilla["again"], elastic["again"], strict=True)
        ),
        "loaded_bytes": elastic["loaded_bytes"],
    }
    print(f"tokens: {results}", flush=True)
    return results | found


def speed(bench: Bench) -> dict[str, Any]:
    """Send workloads to both servers with a tier, in turn."""
    results: dict[str, Any] = {}
    names = [name for name in (VANILLA, ELASTIC, CONTROL) if name in bench.setting.servers.by_name]
    seeds = itertools.count(1)  # no prompt comes twice: a tier would have it
    for label, *workload in bench.sizes.workloads:
        rounds: list[dict[str, Any]] = []
        for number in range(bench.sizes.rounds):
            turn = number % len(names)
            order = names[turn:] + names[:turn]
            seed = next(seeds)
            figures: dict[str, Any] = {
                name: bench.bench(name, *workload, seed=seed) for name in order
            }
            time.sleep(QUIET_SECONDS)
            view = bench.setting.servers.view(ELASTIC)
            rounds.append(figures | {"pages_after": view.resident_bytes / view.page_bytes})
            results[label] = summary(rounds, names)
            bench.record.add(speed=results)  # it is the longest row
        print_summary(label, results[label], names)
    return results


def copies(bench: Bench) -> dict[str, Any]:
    """Store and load the same prompts on both servers, in turn."""
    results: dict[str, Any] = {name: {"store": [], "load": []} for name in (VANILLA, ELASTIC)}
    for number in range(bench.sizes.rounds):
        prompts = [bench.prompt(bench.sizes.short_tokens) for _ in range(4)]
        for name in (VANILLA, ELASTIC) if number % 2 else (ELASTIC, VANILLA):
            server = bench[name]
            for word in ("store", "load"):
                bytes_before, seconds_before = bench.copied(server, word)
                for prompt in prompts:
                    bench.ask(server, prompt)
                bench.settle(server)
                num_bytes, seconds = bench.copied(server, word)
                num_bytes, seconds = num_bytes - bytes_before, seconds - seconds_before
                one = {"bytes": num_bytes, "seconds": seconds}
                one["gb_per_second"] = num_bytes / seconds / 1e9 if seconds else 0.0
                results[name][word].append(one)
                bench.kind.reset(server)
    for word in ("store", "load"):
        speeds = {
            name: statistics.median(one["gb_per_second"] for one in results[name][word])
            for name in (VANILLA, ELASTIC)
        }
        results[f"{word}_ratio"] = speeds[ELASTIC] / speeds[VANILLA] if speeds[VANILLA] else 0.0
        print(f"copies: {word} GB/s {speeds}, ratio {results[f'{word}_ratio']:.3f}", flush=True)
    return results


def back(bench: Bench) -> dict[str, Any]:
    """Compute a long prompt, lose its cache, and ask again."""
    server, servers = bench[ELASTIC], bench.setting.servers
    rounds = []
    for _ in range(max(2 * bench.sizes.rounds, 5)):
        prompt = bench.prompt(bench.sizes.long_tokens)
        computed = bench.ask(server, prompt)
        hot = bench.ask(server, prompt)
        bench.settle(server)
        given = give_back(bench, ELASTIC, servers.view(ELASTIC).cached_bytes)
        before, (bytes_before, seconds_before) = servers.view(ELASTIC), bench.copied(server, "load")
        again = bench.ask(server, prompt)
        bench.settle(server)
        view, (num_bytes, seconds) = servers.view(ELASTIC), bench.copied(server, "load")
        rounds.append(
            {
                "computed_seconds": computed,
                "hot_seconds": hot,
                "again_seconds": again,
                "ratio": again / computed,
                "loaded_bytes": num_bytes - bytes_before,
                "load_seconds": seconds - seconds_before,
                "num_maps": view.map_times.num_calls - before.map_times.num_calls,
                "map_seconds": view.map_times.seconds - before.map_times.seconds,
                "resident_bytes_before": before.resident_bytes,
                "cached_bytes_before": before.cached_bytes,
                "give_ms": given["ms"],
                "vanilla": back_of_vanilla(bench, prompt),
            }
        )
        bench.record.add(back={"rounds": rounds})
    ratios = sorted(one["ratio"] for one in rounds)
    print(
        f"back: {bench.sizes.long_tokens} tokens computed in "
        f"{statistics.median(one['computed_seconds'] for one in rounds):.3f} s, again in "
        f"{statistics.median(one['again_seconds'] for one in rounds):.3f} s, ratio "
        f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}); loaded "
        f"{rounds[-1]['loaded_bytes'] / MIB:.0f} MiB, {rounds[-1]['cached_bytes_before']} B cached",
        flush=True,
    )
    return {"rounds": rounds, "ratio": statistics.median(ratios), "worst_ratio": ratios[-1]}


def back_of_vanilla(bench: Bench, prompt: list[int]) -> dict[str, float]:
    """Ask the vanilla server the same; its tier, too, where its cache can be dropped alone."""
    server = bench[VANILLA]
    found = {"computed_seconds": bench.ask(server, prompt)}
    found["hot_seconds"] = bench.ask(server, prompt)
    bench.settle(server)
    with suppress(NotImplementedError):
        bench.kind.reset(server)
        num_bytes, seconds = bench.copied(server, "load")
        found["again_seconds"] = bench.ask(server, prompt)
        bench.settle(server)
        loaded = bench.copied(server, "load")
        found |= {"loaded_bytes": loaded[0] - num_bytes, "load_seconds": loaded[1] - seconds}
    return found


def give(bench: Bench) -> dict[str, Any]:
    """Have both elastic servers give memory back while requests are computed, in turn."""
    results: dict[str, Any] = {ELASTIC: [], PLAIN: []}
    sizes = bench.sizes
    num_fill = int(1.5 * sizes.given_bytes / bench.kind.kv_bytes_per_token / sizes.short_tokens)
    for number in range(max(2 * sizes.rounds, 5)):
        for name in (ELASTIC, PLAIN) if number % 2 else (PLAIN, ELASTIC):
            for _ in range(num_fill + 1):
                bench.ask(bench[name], bench.prompt(sizes.short_tokens))
            before = bench.copied(bench[name], "store")[0]
            with load(bench, bench[name]):
                given = give_back(bench, name, sizes.given_bytes)
            stored = bench.copied(bench[name], "store")[0] - before
            results[name].append(given | {"stored_bytes_meanwhile": stored})
            bench.record.add(give=results)
    medians = {name: statistics.median(one["ms"] for one in results[name]) for name in results}
    results["ratio"] = medians[ELASTIC] / medians[PLAIN]
    print(
        f"give: {sizes.given_bytes / GIB:.2f} GiB in ms {medians}, ratio {results['ratio']:.3f}",
        flush=True,
    )
    return results


@contextmanager
def load(bench: Bench, server: EngineServer) -> Iterator[None]:
    """Have one prompt after the other computed, and so stored, while the block runs."""
    stop, begun = threading.Event(), threading.Event()
    prompts = [bench.prompt(bench.sizes.short_tokens) for _ in range(NUM_LOAD)]

    def run() -> None:
        for prompt in prompts:  # made before: who measures shares this thread's interpreter
            if not stop.is_set():
                begun.set()
                bench.ask(server, prompt)

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()


ROWS: dict[str, tuple[Callable[[Bench], dict[str, Any]], tuple[str, ...]]] = {
    "tokens": (tokens, (VANILLA, ELASTIC)),
    "speed": (speed, (VANILLA, ELASTIC)),
    "copies": (copies, (VANILLA, ELASTIC)),
    "back": (back, (ELASTIC, VANILLA)),
    "give": (give, (ELASTIC, PLAIN)),
    "disk": (lambda bench: disk(bench, bench.sizes.disk_folder), (DISK,)),
}
