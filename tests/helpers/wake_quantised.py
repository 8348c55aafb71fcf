"""Run as a script: vLLM's own worker wakes with a quantised KV cache over an arena of ours.

Arguments: a model folder, which is not read, and a JSON object: whether our wrapper is `hooked`.
Up to 0.28 the runner is vLLM's too; later releases no longer zero the cache, so a stand-in does.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from kvcached_core.memory.arena import Arena
from kvcached_core.memory.geometry import choose_geometry
from kvcached_core.memory.vmm.host import HostBackend
from kvcached_vllm.worker_hooks import worker_wake_up

GEOMETRY = choose_geometry(block_bytes=65536, num_planes=4, granularity_bytes=2 << 20)
IS_REAL = hasattr(GPUModelRunner, "init_fp8_kv_scales")


class Runner(GPUModelRunner):  # type: ignore[misc]  # vLLM has no types here
    """A runner with a KV cache and no model."""

    def __init__(self, arena: Arena) -> None:
        self.cache_config = SimpleNamespace(cache_dtype="fp8")
        self.compilation_config = SimpleNamespace(static_forward_context={})
        self.kv_caches = [arena.plane_tensor(plane) for plane in range(GEOMETRY.num_planes)]

    if not IS_REAL:

        def init_fp8_kv_scales(self) -> None:
            """Zero the cache, as releases up to 0.28 do."""
            for tensor in self.kv_caches:
                tensor.zero_()


class Sleeper(Worker):  # type: ignore[misc]
    """A worker as far as it wakes."""

    def __init__(self, arena: Arena) -> None:
        self.model_runner = Runner(arena)
        model_config = SimpleNamespace(enable_nccl_comm_suspend=False)
        self.vllm_config = SimpleNamespace(model_config=model_config)
        self._sleep_saved_buffers: dict[str, Any] = {}
        self._sleep_saved_draft_buffers: dict[str, Any] = {}
        self._sleep_saved_parameters: dict[str, Any] = {}
        self.kvcached = SimpleNamespace(zero=arena.zero)
        self._sleep_mode_backend = SimpleNamespace(resume=self.resume)

    def resume(self, _tags: Any) -> None:
        """Bring nothing back."""
        if not IS_REAL:
            self.model_runner.init_fp8_kv_scales()

    def _get_sleep_mode_backend(self) -> Any:
        return self._sleep_mode_backend

    def synchronize_device(self) -> None:
        """Do nothing: there is no device."""


def main() -> None:
    """Wake; touching what is not mapped ends the process."""
    arena = Arena(HostBackend(), GEOMETRY, 8)
    arena.map([0])
    first = arena.plane_tensor(0)[: GEOMETRY.run_bytes]
    first.fill_(7)
    worker = Sleeper(arena)
    is_hooked = json.loads(sys.argv[2])["hooked"]
    wake_up = worker_wake_up(Worker.wake_up) if is_hooked else Worker.wake_up
    wake_up(worker, tags=None)
    assert len(worker.model_runner.kv_caches) == GEOMETRY.num_planes
    assert not first.any()
    print("woken")


if __name__ == "__main__":
    main()
