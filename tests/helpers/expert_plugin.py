"""Lets ranks on a CPU exchange what their experts read, as a plugin of vLLM's processes.

vLLM has that for GPUs alone: its communicator of CPUs lacks two methods. All ranks together add
each row's parts in one order here, with ours and without.
"""

from typing import Any


def register() -> None:
    """Give the communicator its two methods; vLLM calls this in each of its processes."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = _all_gatherv
    CpuCommunicator.reduce_scatterv = _reduce_scatterv


def _all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    import torch

    if isinstance(input_, list):
        return [_all_gatherv(self, one, dim, sizes) for one in input_]
    assert dim == 0
    sizes = sizes or [len(input_)] * self.world_size
    parts = [input_.new_zeros((max(sizes), *input_.shape[1:])) for _ in sizes]
    own = input_.new_zeros(parts[0].shape)
    own[: len(input_)] = input_
    torch.distributed.all_gather(parts, own, group=self.cpu_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _reduce_scatterv(self: Any, input_: Any, dim: int = -1, sizes: list[int] | None = None) -> Any:
    import torch

    assert dim == 0
    sizes = sizes or [len(input_) // self.world_size] * self.world_size
    total = input_.clone()
    torch.distributed.all_reduce(total, group=self.cpu_group)
    begin = sum(sizes[: self.rank_in_group])
    return total[begin : begin + sizes[self.rank_in_group]].clone()
