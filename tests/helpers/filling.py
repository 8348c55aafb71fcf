"""What a benchmark or a check needs inside vLLM's workers: a `--worker-extension-cls`."""

from typing import Any

from helpers.gpu_offline import give_weights


class Filling:
    """Methods that `POST /collective_rpc` reaches; vLLM mixes them into its worker."""

    def fill_weights(self) -> None:
        """Fill the weights, the same each time, so that answers depend on the prompt."""
        give_weights(self)

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
