"""Ranks with the same weights, each on a device of its own.

Run as a script, one rank that is there until it is killed; the argument is the folder of both.
"""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from helpers.fake_driver import FakeDriver, tensors_on_the_host
from helpers.waiting import await_that
from helpers.weight_ranks import PAGE, WeightedRank
from kvcached_core.memory.vmm import dlpack
from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.memory.vmm.shared_host import SharedHostBackend
from kvcached_core.weights.replicas import Replicas

if TYPE_CHECKING:
    from kvcached_core.memory.vmm.backend import SharingBackend

READY = "ready"


class ReplicaRank(WeightedRank):
    """A rank that has pages from others of a folder, and lets them have pages.

    Args:
        folder: Of all of them.
        name: Of this one: its own folder in there.
        driver: Of its GPU; on the host if there is none.
        settings: As those of `WeightedRank`.
    """

    def __init__(
        self, folder: Path, name: str, driver: FakeDriver | None = None, **settings: Any
    ) -> None:
        backend: SharingBackend = SharedHostBackend(PAGE)
        if driver is not None:
            backend = CudaBackend(api=cast("Any", driver), is_sharing=True)
        self.replicas = Replicas(backend, folder / "weights")
        (folder / name).mkdir(mode=0o700, exist_ok=True)
        super().__init__(
            settings.pop("layer", lambda inner: inner)(backend),
            folder / name,
            replicas=self.replicas,
            **({"weights_dir": folder / "weights"} | settings),
        )

    def start(self) -> "ReplicaRank":
        """Start as any rank does, and return when others find this one."""
        super().start()
        await_that(lambda: self.replicas._exporting is not None)
        self.done.clear()
        return self

    @property
    def num_from_host(self) -> int:
        """Pages that came from the host copy since `done` was cleared last."""
        return self.done.count("copy_in")


class _Everywhere:
    """What `tensors_on_the_host` patches with, where there is no test."""

    setattr = staticmethod(setattr)


def main() -> None:
    """Be a rank that others read, until a signal ends it."""
    tensors_on_the_host(_Everywhere())
    assert dlpack.CUDA == dlpack.CPU
    rank = ReplicaRank(Path(sys.argv[1]), "theirs", FakeDriver(granularity_bytes=PAGE)).start()
    print(READY, flush=True)
    signal.pause()
    rank.close()


if __name__ == "__main__":
    main()
