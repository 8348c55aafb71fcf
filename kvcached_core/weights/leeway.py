"""A little memory of a device kept back, so that a full device can still be looked at."""

from collections.abc import Callable
from typing import Any, TypeVar

from kvcached_core.config import CUDA
from kvcached_core.errors import OutOfMemoryError
from kvcached_core.units import MIB

# Tensors of a size that torch's allocator takes several of from one piece of 2 MiB. What a look
# needs meanwhile are some of less than that size.
NUM_TENSORS, TENSOR_BYTES = 6, MIB

_Result = TypeVar("_Result")


class Leeway:
    """What torch has on a device for short work that must not fail for want of memory.

    One thread at a time uses it.

    Args:
        device: Where, as torch names it. On the host nothing is kept back.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._kept: list[Any] = []
        if device.type == CUDA:
            self._keep()

    def use(self, work: Callable[[], _Result]) -> _Result:
        """Return what `work` does; if it finds no memory, do it with what was kept back.

        Raises:
            OutOfMemoryError: If that is not enough, either. torch's own error is none of ours, and
                would end an engine.
        """
        import torch  # noqa: PLC0415  the core needs torch nowhere else

        try:
            return work()
        except torch.OutOfMemoryError:
            num_bytes = len(self._kept) * TENSOR_BYTES
            self._kept.clear()
        try:
            return work()
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError("look at pages", "no memory", num_bytes) from error
        finally:
            self._keep()

    def _keep(self) -> None:
        import torch  # noqa: PLC0415  as above

        try:
            while len(self._kept) < NUM_TENSORS:
                self._kept.append(torch.empty(TENSOR_BYTES, dtype=torch.int8, device=self._device))
        except torch.OutOfMemoryError:
            return  # it is tried again when it was needed
