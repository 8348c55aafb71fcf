"""What vLLM's own connector copies of a block: the rows of the tensors that it registers."""

from types import SimpleNamespace
from typing import Any

import torch


def registered(plan: Any, caches: dict[str, torch.Tensor]) -> Any:
    """Return what `OffloadingConnector` hands to its copier for these caches of a plan."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import (
        OffloadingConnectorWorker,
    )

    found: list[Any] = []
    parallel = SimpleNamespace(
        tensor_parallel_size=1, prefill_context_parallel_size=1, world_size=2
    )
    worker = OffloadingConnectorWorker(
        SimpleNamespace(replicated_layout=False, get_worker=found.append),
        SimpleNamespace(parallel_config=parallel),
        plan,
    )
    worker.register_kv_caches(caches)
    return found[0]


def block_bytes(copied: Any, group: int, block_id: int) -> list[bytes]:
    """Return the bytes of a group's block that are copied, a piece for each reference."""
    return [
        bytes(copied.tensors[ref.tensor_idx].tensor[block_id, : ref.page_size_bytes].numpy())
        for ref in copied.group_data_refs[group]
    ]


def assert_same_copies(
    ours: tuple[Any, dict[str, torch.Tensor]],
    vanillas: tuple[Any, dict[str, torch.Tensor]],
    ids: list[int],
) -> None:
    """See that blocks of ours, filled as the first ones of vanilla's, are copied as these are."""
    for number, block_id in enumerate(ids):
        for layer, (name, theirs) in enumerate(vanillas[1].items(), 1):
            content = torch.arange(theirs[number].numel()).view(theirs[number].shape)
            theirs[number] = content % 101 + layer
            ours[1][name][block_id] = content % 101 + layer
    copied, expected = registered(*ours), registered(*vanillas)
    sizes = [each.page_size_bytes for each in expected.tensors]
    assert [each.page_size_bytes for each in copied.tensors] == sizes
    for group in range(len(expected.group_data_refs)):
        for number, block_id in enumerate(ids):
            pieces = block_bytes(expected, group, number)
            assert block_bytes(copied, group, block_id) == pieces
            assert any(any(piece) for piece in pieces)
