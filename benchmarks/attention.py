"""What attention costs over our pages: decoding steps over the same blocks in different memory.

    python benchmarks/attention.py --json benchmarks/results/attention.json

A step is a CUDA graph of 32 layers of Llama-3.1-8B's shape, each one product with as many weights
as the layer has and one call of vLLM's FlashAttention 3. The steps over different memory are
replayed in turn:

* dense: one allocation per layer, as vLLM makes them, blocks next to each other;
* scattered: the same memory, every run of 8 blocks in 2 MiB of its own, as in our pages of 16 MiB;
* pages: our arena, by the size of its pages.
"""

import statistics
from typing import Any

import torch
from parts.machine import describe_gpu
from parts.record import command_line, write

from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import Geometry, choose_geometry
from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.units import GIB, MIB

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_TOKENS = 32, 32, 8, 128, 16
BLOCK_BYTES = BLOCK_TOKENS * NUM_KV_HEADS * 2 * HEAD_SIZE * 2
DENSE_BLOCKS = 24 * GIB // (BLOCK_BYTES * NUM_LAYERS)
RUN_BLOCKS = 8
SLOT_BLOCKS = 2 * MIB // BLOCK_BYTES
LAYER_PARAMETERS = (4096, 53248)
LOADS = ((8, 164), (8, 570), (64, 164), (64, 570), (64, 1900))
PAGE_MIB = (16, 32, 64)
NUM_REPLAYS = 25


def as_cache(memory: torch.Tensor) -> torch.Tensor:
    """Return a plane's bytes as (blocks, tokens, heads, K and V)."""
    return memory.view(torch.bfloat16).view(-1, BLOCK_TOKENS, NUM_KV_HEADS, 2 * HEAD_SIZE)


class Step:
    """A replayable decoding step of `batch` requests with `context` tokens each.

    The graph reads its inputs where they were when it was captured, so they live as long as it.
    """

    def __init__(self, planes: list[torch.Tensor], table: torch.Tensor, context: int) -> None:
        batch = len(table)
        cuda: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        self._planes = planes
        self._table = table
        self._context = context
        self._query = torch.randn(batch, NUM_HEADS, HEAD_SIZE, **cuda)
        self._out = torch.empty_like(self._query)
        self._hidden = torch.randn(batch, LAYER_PARAMETERS[0], **cuda)
        self._used = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self._starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, weights: torch.Tensor) -> None:
        """Run once and record the graph."""
        self._run(weights)
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            self._run(weights)

    def replay(self) -> None:
        """Run once more."""
        self._graph.replay()

    def _run(self, weights: torch.Tensor) -> None:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        for plane, weight in zip(self._planes, weights, strict=True):
            torch.mm(self._hidden, weight)
            cache = as_cache(plane)
            flash_attn_varlen_func(
                q=self._query,
                k=cache[..., :HEAD_SIZE],
                v=cache[..., HEAD_SIZE:],
                out=self._out,
                cu_seqlens_q=self._starts,
                max_seqlen_q=1,
                seqused_k=self._used,
                max_seqlen_k=self._context,
                causal=True,
                block_table=self._table,
                fa_version=3,
            )


def block_table(ids: list[int], batch: int, context: int, *, in_turn: bool) -> torch.Tensor:
    """Return which blocks each request has.

    Args:
        ids: The blocks in the order in which they are handed out.
        batch: Number of requests.
        context: Tokens of each.
        in_turn: Whether the requests took their blocks in turn, as they do while they decode, or
            one after the other, as they do at prefill.
    """
    num_blocks = -(-context // BLOCK_TOKENS)
    taken = torch.tensor(ids[: batch * num_blocks], dtype=torch.int32)
    table = taken.view(num_blocks, batch).T if in_turn else taken.view(batch, num_blocks)
    return table.contiguous().cuda()


def replay_in_turn(steps: dict[str, Step]) -> dict[str, float]:
    """Return the median microseconds of each step."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(NUM_REPLAYS):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def elastic_memory(backend: CudaBackend, page_mib: int) -> tuple[list[torch.Tensor], list[int]]:
    """Map 16 GiB of our pages; return the planes and the block ids in them."""
    geometry: Geometry = choose_geometry(
        block_bytes=BLOCK_BYTES,
        num_planes=NUM_LAYERS,
        granularity_bytes=backend.granularity_bytes,
        target_page_bytes=page_mib * MIB,
    )
    arena = Arena(backend, geometry, 120 * GIB // geometry.page_bytes)
    num_pages = 16 * GIB // geometry.page_bytes
    arena.map(range(num_pages))
    backend.synchronize()
    planes = [arena.plane_tensor(plane) for plane in range(NUM_LAYERS)]
    return planes, [geometry.block_id(n) for n in range(num_pages * geometry.blocks_per_page)]


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = command_line(__doc__)
    path = arguments.parse_args().json
    results: dict[str, Any] = {"machine": describe_gpu(), "microseconds": {}}
    weights = torch.randn(NUM_LAYERS, *LAYER_PARAMETERS, device="cuda", dtype=torch.bfloat16)
    size = DENSE_BLOCKS * BLOCK_BYTES
    dense = [torch.zeros(size, device="cuda", dtype=torch.int8) for _ in range(NUM_LAYERS)]
    scattered = [
        slot * SLOT_BLOCKS + n for slot in range(DENSE_BLOCKS // SLOT_BLOCKS) for n in range(8)
    ]
    backend = CudaBackend()
    memories = {"dense": (dense, list(range(DENSE_BLOCKS))), "scattered": (dense, scattered)}
    memories |= {f"pages of {mib} MiB": elastic_memory(backend, mib) for mib in PAGE_MIB}
    for batch, context, in_turn in [(*load, order) for load in LOADS for order in (False, True)]:
        steps = {}
        for name, (planes, ids) in memories.items():
            if len(ids) >= batch * -(-context // BLOCK_TOKENS):
                table = block_table(ids, batch, context, in_turn=in_turn)
                steps[name] = Step(planes, table, context)
                steps[name].capture(weights)
        found = replay_in_turn(steps)
        label = f"{batch} x {context}, {'in turn' if in_turn else 'one by one'}"
        results["microseconds"][label] = found
        shown = "  ".join(
            f"{name} {value:.1f} = {value / found['dense']:.4f}" for name, value in found.items()
        )
        print(f"{label:28} {shown}", flush=True)
    write(path, results)


if __name__ == "__main__":
    main()
