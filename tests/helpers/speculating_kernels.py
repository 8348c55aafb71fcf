"""SGLang's kernels of speculative decoding on a CPU, in torch, as a plugin that it finds.

SGLang's CPU engine has workers, trees and attention for it; what it calls is compiled and not on
the package index. Servers with kvcached and without use the same ones. Nothing of SGLang is
imported before it calls us.
"""

import ctypes
import sys
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

STAND_IN = "sgl_kernel"


def copy_all_layer_kv_cache_cpu(
    addresses: torch.Tensor, strides: torch.Tensor, targets: torch.Tensor, sources: torch.Tensor
) -> None:
    """Copy tokens of every plane from some ids to others, which may overlap."""
    for address, stride in zip(addresses.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(address + each * stride, stride) for each in sources.tolist()]
        for target, row in zip(targets.tolist(), rows, strict=True):
            ctypes.memmove(address + target * stride, row, stride)


def assign_draft_cache_locs_contiguous_cpu(  # noqa: PLR0917  as SGLang calls it
    rows: Any, table: Any, lengths: Any, out: Any, _width: int, topk: int, num_columns: int
) -> None:
    """Write the ids behind each request's tokens to `out`."""
    number = topk * num_columns
    for index, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        out[index * number :][:number] = table[row, length : length + number]


def assign_extend_cache_locs_cpu(
    rows: Any, table: Any, starts: Any, ends: Any, out: Any, _width: int
) -> None:
    """Write the ids of a range of each request's tokens to `out`, one behind the other."""
    parts = [
        table[row, start:end]
        for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)
    ]
    ids = torch.cat(parts)
    out[: len(ids)] = ids


def assign_req_to_token_pool_cpu(
    rows: Any, table: Any, starts: Any, ends: Any, ids: Any, _width: int
) -> None:
    """Write ids to a range of each request's row, taken one behind the other."""
    first = 0
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        table[row, start:end] = ids[first : first + end - start].to(table.dtype)
        first += end - start


def fill_bonus_tokens_cpu(tokens: Any, lengths: Any, out: Any, stride: int) -> None:
    """Write the last token that each request accepted to `out`."""
    out.copy_(tokens.flatten()[torch.arange(len(lengths)) * stride + lengths.long() - 1])


def fill_accept_out_cache_loc_cpu(accepted: Any, ids: Any, out: Any) -> None:
    """Write the ids of accepted tokens to `out`, without gaps."""
    kept = ids[accepted[accepted > -1].long()]
    out[: len(kept)] = kept


def verify_tree_greedy_cpu(
    *,
    predicts: Any,
    accept_index: Any,
    accept_token_num: Any,
    candidates: Any,
    retrive_index: Any,
    retrive_next_token: Any,
    retrive_next_sibling: Any,
    target_predict: Any,
) -> None:
    """Follow each request's tree as long as the target says what a child of a node has."""
    target = target_predict.flatten()
    for request in range(len(candidates)):
        node, accepted = 0, [int(retrive_index[request, 0])]
        while len(accepted) < accept_index.shape[1]:
            wanted = target[accepted[-1]]
            child = int(retrive_next_token[request, node])
            while child != -1 and candidates[request, child] != wanted:
                child = int(retrive_next_sibling[request, child])
            if child == -1:
                break
            node = child
            accepted.append(int(retrive_index[request, child]))
        accept_index[request, : len(accepted)] = torch.tensor(accepted)
        predicts[accepted] = target[accepted].to(predicts.dtype)
        accept_token_num[request] = len(accepted) - 1


def build_tree_kernel_efficient_cpu(  # noqa: PLR0917  as SGLang calls it
    parents: Any,
    selected: Any,
    lengths: Any,
    mask: Any,
    positions: Any,
    index: Any,
    next_token: Any,
    next_sibling: Any,
    topk: int,
    _depth: int,
    num_tokens: int,
    _mode: int,
) -> None:
    """Make the tree of drafted tokens: who is whose parent, and sees whom."""
    trees = mask.view(-1, num_tokens, num_tokens)
    for request, length in enumerate(lengths.tolist()):
        chosen = selected[request].tolist()
        parent_of = {0: -1}
        for node, choice in enumerate(chosen, 1):
            group = choice // topk
            parent_of[node] = 1 + chosen.index(int(parents[request, group])) if group else 0
        _write_tree(
            parent_of,
            trees[request],
            positions.view(-1, num_tokens)[request],
            (index[request], next_token[request], next_sibling[request]),
            request * num_tokens,
            length,
        )


def reconstruct_indices_from_tree_mask(  # noqa: PLR0917  as SGLang calls it
    mask: Any,
    lengths: Any,
    positions: Any,
    index: Any,
    next_token: Any,
    next_sibling: Any,
    _num_requests: int,
    num_tokens: int,
) -> None:
    """Make the same of a tree that says of each node whom it sees."""
    trees = mask.view(-1, num_tokens, num_tokens)
    for request, length in enumerate(lengths.tolist()):
        seen = trees[request].clone()
        parent_of = {
            node: max((other for other in range(node) if seen[node, other]), default=-1)
            for node in range(num_tokens)
        }
        _write_tree(
            parent_of,
            trees[request],
            positions.view(-1, num_tokens)[request],
            (index[request], next_token[request], next_sibling[request]),
            request * num_tokens,
            length,
        )


def _write_tree(  # noqa: PLR0917  one request's part of what SGLang passes
    parent_of: dict[int, int],
    mask: Any,
    positions: Any,
    links: tuple[Any, Any, Any],
    first: int,
    length: int,
) -> None:
    index, next_token, next_sibling = links
    mask.fill_(value=False)
    next_token.fill_(-1)
    next_sibling.fill_(-1)
    for node in sorted(parent_of, reverse=True):
        parent = parent_of[node]
        index[node] = first + node
        if parent >= 0:
            next_sibling[node] = next_token[parent]
            next_token[parent] = node
    for node in sorted(parent_of):
        if parent_of[node] >= 0:
            mask[node] = mask[parent_of[node]]
        mask[node, node] = True
        positions[node] = length + int(mask[node].sum()) - 1


def build_draft_decode_metadata_cpu(
    table: Any, rows: Any, lengths: Any, topk: int, num_steps: int, _width: int
) -> Any:
    """Return a row of ids for each branch of each request: its tokens, then those of the branch."""
    drafted = table[rows].repeat_interleave(topk, 0).clone()
    for request, length in enumerate(lengths.tolist()):
        for branch in range(topk):
            start = length + branch * num_steps
            ids = table[rows[request], start : start + num_steps]
            drafted[request * topk + branch, length : length + num_steps] = ids
    return drafted


def decode_attention_cpu(  # noqa: PLR0917  as SGLang calls it
    query: Any,
    keys: Any,
    values: Any,
    _key_scale: float,
    _value_scale: float,
    out: Any,
    key: Any,
    value: Any,
    ids: Any,
    _logits: Any,
    table: Any,
    rows: Any,
    lengths: Any,
    scaling: float,
    *_rest: Any,
) -> None:
    """Write what is new, then attend one token of each request to all of its tokens."""
    if key is not None:
        keys[ids] = key.view(-1, *keys.shape[1:])
        values[ids] = value.view(-1, *values.shape[1:])
    for request, length in enumerate(lengths.tolist()):
        seen = table[rows[request], :length]
        out[request] = _attend(query[request : request + 1], keys[seen], values[seen], scaling)[0]


def extend_attention_cpu(  # noqa: PLR0917  as SGLang calls it
    query: Any,
    _key: Any,
    _value: Any,
    out: Any,
    keys: Any,
    values: Any,
    _key_scale: float,
    _value_scale: float,
    table: Any,
    rows: Any,
    lengths: Any,
    new_lengths: Any,
    starts: Any,
    _longest: int,
    scaling: float,
    _cap: float,
    _is_cross: bool,  # noqa: FBT001
    _window: int,
    _encoder: Any,
    _sinks: Any,
    tree: Any,
    _is_causal: bool,  # noqa: FBT001
) -> None:
    """Attend the last tokens of each request, a chain or a tree, to what each of them sees."""
    for request, length in enumerate(lengths.tolist()):
        number, start = int(new_lengths[request]), int(starts[request])
        seen = table[rows[request], :length]
        mask = torch.ones(number, length, dtype=torch.bool).tril(length - number)
        if tree is not None:
            mask[:, length - number :] = tree.view(-1, number, number)[request]
        asked = query[start : start + number]
        out[start : start + number] = _attend(asked, keys[seen], values[seen], scaling, mask)


def _attend(query: Any, keys: Any, values: Any, scaling: float, mask: Any = None) -> Any:
    return scaled_dot_product_attention(
        query.movedim(0, 1)[None],
        keys.movedim(0, 1)[None],
        values.movedim(0, 1)[None],
        attn_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )[0].movedim(1, 0)


KERNELS = {
    each.__name__: each
    for each in (
        copy_all_layer_kv_cache_cpu,
        assign_draft_cache_locs_contiguous_cpu,
        assign_extend_cache_locs_cpu,
        assign_req_to_token_pool_cpu,
        fill_bonus_tokens_cpu,
        fill_accept_out_cache_loc_cpu,
        verify_tree_greedy_cpu,
        build_tree_kernel_efficient_cpu,
        build_draft_decode_metadata_cpu,
    )
}
OPERATORS = (decode_attention_cpu, extend_attention_cpu)


def register() -> None:
    """Put them in the places of SGLang's, also where some were imported before."""
    import sgl_kernel

    speculative: Any = ModuleType(f"{STAND_IN}.speculative")
    speculative.reconstruct_indices_from_tree_mask = reconstruct_indices_from_tree_mask
    sys.modules[speculative.__name__] = speculative
    for name, kernel in KERNELS.items():
        setattr(sgl_kernel, name, kernel)
    for operator in OPERATORS:
        setattr(torch.ops.sgl_kernel, operator.__name__, operator)
    for module in [*sys.modules.values()]:
        if getattr(module, "__name__", "").startswith("sglang."):
            for name, value in [*vars(module).items()]:
                if getattr(value, "__module__", "") == STAND_IN and _name_of(value) in KERNELS:
                    setattr(module, name, KERNELS[_name_of(value)])


def _name_of(stand_in: Any) -> str:
    """Return which kernel a stand-in that raises is in the place of."""
    cells = getattr(stand_in, "__closure__", None) or ()
    return next((cell.cell_contents for cell in cells if isinstance(cell.cell_contents, str)), "")
