"""The pool of CUDA graphs on the annex: torch allocates it there, by a function of ours.

What a graph computes in between lies in memory that torch counts as free again; it is written anew
by each replay. What torch counts as allocated is kept.
"""

import ctypes
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvcached_core.errors import KVCachedError
from kvcached_core.weights.annex import Annex, Ranges

logger = logging.getLogger("kvcached")

# What torch calls for memory: a size in bytes, a device and a stream; and an address back.
ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)

Snapshot = Callable[[], Sequence[Mapping[str, Any]]]


class GraphPool:
    """Segments of torch's allocator on the annex.

    torch calls while it holds a lock, and another thread may wait for that with the interpreter's
    own. So no call of torch's comes to Python once graphs are captured: it frees by a function that
    does nothing, and what it has freed is looked up before the annex goes.

    Attributes:
        allocate: The address of the function by which torch allocates.
        free: That of the one by which it frees.

    Args:
        annex: Where they lie.
        snapshot: Returns torch's segments, as `torch.cuda.memory_snapshot` does.
    """

    def __init__(self, annex: Annex, snapshot: Snapshot) -> None:
        self._annex = annex
        self._snapshot = snapshot
        self._function = ALLOCATE(self._allocate)
        self.allocate = _address(self._function)
        # It may be called with any arguments, by any thread, at any time.
        self.free = _address(ctypes.pythonapi.Py_IsInitialized)

    @property
    def num_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(self._annex.sizes(self).values())

    def in_use(self, spans: Mapping[int, int]) -> Mapping[int, Ranges]:
        """See `Tenant.in_use`: of each segment that torch has, the blocks that are allocated."""
        return {
            segment["address"]: [
                (block["address"], block["size"])
                for block in segment["blocks"]
                if block["state"] != "inactive"
            ]
            for segment in self._snapshot()
            if segment["address"] in spans
        }

    def _allocate(self, num_bytes: int, _device: int, _stream: int | None) -> int | None:
        try:
            return self._annex.take(num_bytes, self)
        except KVCachedError as error:
            logger.warning("kvcached: no memory for CUDA graphs: %s", error)
            return None  # torch raises its own error


class TorchPool:
    """A graph pool that torch knows: what is captured into it lies on the annex.

    It lives as long as the process, because graphs may.

    Attributes:
        id: What names it for `torch.cuda.graph`.
        memory: Its segments.

    Args:
        annex: Where they lie; of the current device.
    """

    def __init__(self, annex: Annex) -> None:
        import torch  # noqa: PLC0415  the core needs torch nowhere else

        self.memory = GraphPool(annex, torch.cuda.memory_snapshot)
        functions = self.memory.allocate, self.memory.free
        self._allocator = torch._C._cuda_customAllocator(*functions)  # noqa: SLF001  as vLLM does
        self._pool = torch.cuda.MemPool(self._allocator)
        self.id: tuple[int, int] = self._pool.id

    def take_workspaces(self) -> None:
        """Let cuBLAS have its workspaces of the current stream here: 32 MiB each on Hopper.

        No graph may have been captured: it would go on with those that there were.
        """
        import torch  # noqa: PLC0415  as above

        torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001  there is no other way to give them
        with torch.cuda.use_mem_pool(self._pool), torch.inference_mode():
            ones = torch.ones(64, 64, dtype=torch.float16, device="cuda")
            torch.addmm(ones[0], torch.mm(ones, ones), ones)  # with cuBLASLt, and without


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
