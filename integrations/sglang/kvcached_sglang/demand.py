"""What the next batches of a SGLang scheduler take, and what lies where: read of it, in blocks."""

from typing import Any

from kvcached_core.engine.demand import Demand
from kvcached_sglang.requests import num_beams_beside, num_computed
from kvcached_sglang.speculating import num_allocated, tokens_of_next_decode

# How much of a request's answer an admission counts on, as SGLang's own policy does.
MAX_ANSWER_TOKENS = 4096


def demand_of(scheduler: Any, block_tokens: int, prefill_tokens: int) -> Demand:
    """Return what the next batch takes at most.

    Args:
        scheduler: SGLang's.
        block_tokens: Tokens of a block.
        prefill_tokens: The most tokens of prompts that a batch computes.
    """
    batches = (scheduler.running_batch, scheduler.last_batch)
    num_running = sum(
        _blocks_of_next_decode(batch, block_tokens) for batch in batches if batch is not None
    )
    if scheduler.chunked_req is not None:
        num_blocks, length = _blocks_of(scheduler.chunked_req, block_tokens)
        num_running += num_blocks
        prefill_tokens -= length
    queued = []
    for request in scheduler.waiting_queue:
        if prefill_tokens <= 0:
            break
        num_blocks, length = _blocks_of(request, block_tokens)
        queued.append(num_blocks)
        prefill_tokens -= length
    return Demand(num_running, sum(queued), min(queued, default=0), len(queued))


def _blocks_of_next_decode(batch: Any, block_tokens: int) -> int:
    num_tokens = tokens_of_next_decode(batch)
    if num_tokens is None:
        return len(batch.reqs) + sum(map(num_beams_beside, batch.reqs))
    return -(-num_tokens // block_tokens)


def _blocks_of(request: Any, block_tokens: int) -> tuple[int, int]:
    """Return the blocks of a request with its answer, and the tokens that it has."""
    length = len(request.origin_input_ids) + len(request.output_ids)
    answer = min(request.sampling_params.max_new_tokens or 0, MAX_ANSWER_TOKENS)
    return -(-(length + answer) // block_tokens) + 1, length


def tokens_to_go_on(scheduler: Any, block_tokens: int) -> int:
    """Return the tokens that the next part of a prompt needs which was begun, beside what runs."""
    request = scheduler.chunked_req
    missing = len(request.origin_input_ids) + len(request.output_ids) - num_computed(request)
    chunk = min(missing, scheduler.chunked_prefill_size or missing)
    num_running = _blocks_of_next_decode(scheduler.running_batch, block_tokens)
    return int(chunk + (num_running + 1) * block_tokens)


def named_blocks(scheduler: Any, batch: Any, block_tokens: int) -> Any:
    """Return the ids of all blocks that a batch reads or writes, as a tensor on the device."""
    import torch

    table = scheduler.req_to_token_pool.req_to_token
    lengths, written = batch.seq_lens.tolist(), batch.out_cache_loc
    if tokens_of_next_decode(batch) is not None and batch.forward_mode.is_decode():
        lengths, written = list(map(num_allocated, batch.reqs)), None  # it is found later
    rows = batch.req_pool_indices.tolist()
    named = [table[row, :length] for row, length in zip(rows, lengths, strict=True)]
    if written is not None:
        named.append(written)
    tokens = torch.cat([part.reshape(-1).to(torch.int64) for part in named])
    return torch.unique(tokens // block_tokens)
