"""What a benchmark or a check needs inside vLLM's workers: a `--worker-extension-cls`."""

from typing import Any

from helpers.gpu_offline import give_weights


class Filling:
    """Methods that `POST /collective_rpc` reaches; vLLM mixes them into its worker."""

    def fill_weights(self) -> None:
        """Fill all weights, the same each time, so that answers depend on the prompt.

        After a sleep of level 2 nothing of them is left, norms and biases included.
        """
        import torch

        give_weights(self)
        model: Any = self.model_runner.model  # type: ignore[attr-defined]  # the worker's
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() < 2 and parameter.is_floating_point():
                    parameter.fill_(1)

    def pretend_asleep(self, num_bytes: str) -> None:
        """Enter what a GPU's allocator would hold asleep into its table, where there is no GPU."""
        from vllm.device_allocator import AllocationData
        from vllm.device_allocator.cumem import CuMemAllocator

        allocator: Any = CuMemAllocator.instance or CuMemAllocator()
        CuMemAllocator.instance = allocator
        data = AllocationData((0, int(num_bytes), 1, 0), "weights")
        if hasattr(data, "is_asleep"):
            data.is_asleep = True
        allocator.pointer_to_data = {1: data} if int(num_bytes) else {}
