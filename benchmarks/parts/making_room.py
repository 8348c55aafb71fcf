"""Memory that goes from one model to another: three parts of the benchmark of weights."""

from typing import Any

from parts.neighbour import Neighbour
from parts.vllm_servers import kv_bytes_per_token
from parts.yielding import FIRST, SECOND, Run

from kvcached_core.units import GIB, MIB
from kvcached_demo.harness.model import KV_BYTES_PER_TOKEN

# What the second model's prefix cache may take: less than the first one's weights, so that it gives
# weights, too. Less than the lowest of them is left when it is full; its pages are smaller.
CACHE_BYTES, FULL_BYTES = 3 * GIB, 256 * MIB
TINY_CACHE_BYTES, TINY_FULL_BYTES = 48 * MIB, 16 * MIB
NUM_FILL_TOKENS, TINY_NUM_FILL_TOKENS = 8000, 500
MAX_FILLS = 3


def turns(run: Run, num: int) -> dict[str, Any]:
    """Ask two models in turn whose weights do not fit together: one gives, the other comes."""
    run.sleep(FIRST)
    run.first_token_seconds(SECOND)
    room = run.room_bytes()
    needed = run.view(FIRST).weights_needed_bytes
    seconds: dict[str, list[float]] = {FIRST: [], SECOND: []}
    with run.taken(max(room - needed // 4, 0)):
        for number in range(num):
            name = (FIRST, SECOND)[number % 2]
            seconds[name].append(run.first_token_seconds(name))
    return {"seconds": seconds, "room_bytes": needed // 4}


def cache(run: Run, num: int) -> dict[str, Any]:
    """Ask a model that has yielded; another gives its full prefix cache and idle weights first."""
    found: dict[str, list[float]] = {"seconds": [], "left_bytes": []}
    found |= {"given_cache_bytes": [], "given_weights_bytes": []}
    run.sleep(FIRST)
    run.ask(SECOND)
    cache_bytes = TINY_CACHE_BYTES if run.tiny else CACHE_BYTES
    with run.taken(max(run.room_bytes() - cache_bytes, 0)) as holder:
        for number in range(max(num // 8, 3)):
            run.sleep(FIRST)
            run.ask(SECOND)  # it has all its weights: what is left is for its cache
            found["left_bytes"].append(_fill(run, holder, number))
            before = run.view(SECOND)
            found["seconds"].append(run.first_token_seconds(FIRST))
            after = run.view(SECOND)
            found["given_cache_bytes"].append(before.cached_bytes - after.cached_bytes)
            found["given_weights_bytes"].append(before.weights_bytes - after.weights_bytes)
    run.sleep(FIRST)
    run.ask(SECOND)  # its tokens are looked at, too
    return dict(found)


def _fill(run: Run, holder: Neighbour, seed: int) -> int:
    """Let the second model's prefix cache take the room there is; return what it leaves."""
    size, full = NUM_FILL_TOKENS, FULL_BYTES
    token_bytes = kv_bytes_per_token("llama-8b")
    if run.tiny:
        size, full, token_bytes = TINY_NUM_FILL_TOKENS, TINY_FULL_BYTES, KV_BYTES_PER_TOKEN
    left = holder.room_bytes
    for number in range(MAX_FILLS):
        if left < full:
            break
        num = left // token_bytes // size + 1
        run.load(SECOND, num, size, 1, seed=1000 + MAX_FILLS * seed + number)
        left = holder.room_bytes
    return left


def give(run: Run, num: int) -> dict[str, Any]:
    """Ask for all weights of an idle model in the name of a row of this process."""
    first, whole, unmaps = [], [], []
    for _ in range(max(num // 10, 3)):
        run.first_token_seconds(FIRST)
        run.sleep(SECOND)
        before = run.view(FIRST)
        needed = before.weights_bytes
        with run.servers.open_ledger() as ledger:
            neighbour = Neighbour(ledger)
            try:
                ledger.promise(neighbour.row, neighbour.room_bytes, 2 * MIB)
                took = neighbour.take(needed, 2 * MIB)
            finally:
                neighbour.close()
        first.append(took[0])
        whole.append(took[1])
        unmaps.append((run.view(FIRST).unmap_times.seconds - before.unmap_times.seconds) * 1e3)
    return {"bytes": needed, "first_page_ms": first, "all_ms": whole, "unmaps_ms": unmaps}
